"""`recommend`: which method and budget for a user's own model and prompts."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtrim.cli import options, output
from kvtrim.errors import UsageError
from kvtrim.records import OK

if TYPE_CHECKING:
    from kvtrim.bench.recommend import Plan

METHODS = ("streaming-llm", "knorm", "snapkv", "adakv", "chunkkv", "keydiff", "curdkv", "kvzip")
KEEPS = ("5%", "10%", "25%", "50%")

Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        help='Your prompts: .jsonl with {"context", "question"} or {"prompt"} per line, or .txt '
        "with one prompt per line (\\n for a line break).",
    ),
]
Tolerance = Annotated[
    float,
    typer.Option(min=0, help="Largest mean divergence from the full cache, nats per token."),
]
Protocol = Annotated[
    str,
    typer.Option(
        help="question-agnostic (compress the context before the question is known) or "
        "question-aware."
    ),
]
NewTokens = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Tokens of the full cache's answer.")
]


def recommend(
    prompts: Prompts = None,
    method: options.Methods = None,
    keep: options.Keeps = None,
    tolerance: Tolerance = 0.05,
    protocol: Protocol = "question-agnostic",
    set_: options.Set = None,
    max_new_tokens: NewTokens = 32,
    chat: options.Chat = None,
    truncate: options.Truncate = "error",
    prefill_chunk: options.Chunk = None,
    model: options.Model = "smollm2",
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    allow_untested: options.AllowUntested = False,
    json: options.Json = False,
) -> None:
    """Measure methods and budgets on your prompts, and name the smallest that stays near full.

    Near: the next-token distributions along the full cache's own answer diverge from its by no
    more than the tolerance, on average over the prompts.
    """
    options.require_choice("--protocol", protocol, options.PROTOCOLS)
    cut = options.choose("--truncate", truncate, options.TRUNCATE)
    if prompts is None:
        raise UsageError("name a file with your prompts: --prompts FILE (.jsonl or .txt)")
    from kvtrim.bench import recommend as bench
    from kvtrim.bench.candidates import require_support

    cells = _cells(method or list(METHODS), keep or list(KEEPS), set_)
    asked = bench.read(prompts)
    aware = protocol == "question-aware"
    plan = bench.Plan(cells, aware, max_new_tokens, tolerance, chat, cut, prefill_chunk)
    loaded, tokenizer = options.load(model, device, dtype, threads, allow_untested)
    if method is None:
        cells = _servable(loaded, cells)
        plan = replace(plan, cells=cells)
    require_support(loaded, cells)
    given = bench.encode(loaded, tokenizer, plan, asked)
    with output.progress() as report:
        lines = bench.measure(loaded, tokenizer, plan, given, report)
    found = _outcome(loaded, model, protocol, plan, asked, lines)
    found["prompts"]["tokens"] = [len(prompt) for prompt in given]
    if json:
        output.print_json(found)
    else:
        _print(found)


def _cells(methods: list[str], keeps: list[str], set_: list[str] | None) -> Any:
    from kvtrim.bench.candidates import PLAIN, candidates
    from kvtrim.methods.keep import Keep

    settings = options.parse_settings(set_)
    chosen = candidates(methods, [str(Keep.parse(keep)) for keep in keeps], settings)
    cells = [cell for cell in chosen if cell.method not in (PLAIN, "full")]
    if not cells:
        raise UsageError("nothing to compare with the full cache; name other methods")
    return cells


def _servable(model: Any, cells: Any) -> Any:
    """Those of the methods tried by default that this model can serve; the others are named."""
    from kvtrim.bench.candidates import require_support
    from kvtrim.errors import KvtrimError

    refused = {}
    for cell in {cell.label: cell for cell in cells}.values():
        try:
            require_support(model, [cell])
        except KvtrimError as error:
            refused[cell.label] = error
            output.note(f"{cell.label} is left out: {error}")
    left = [cell for cell in cells if cell.label not in refused]
    if not left:
        raise next(iter(refused.values()))
    return left


def _outcome(
    model: Any, name: str, protocol: str, plan: "Plan", asked: Any, lines: list[dict[str, Any]]
) -> dict[str, Any]:
    from kvtrim.bench import recommend as bench
    from kvtrim.bench.provenance import outside, provenance
    from kvtrim.hf.models import fingerprint

    rows = bench.rows(lines, plan.tolerance)
    small = bench.smallest(rows)
    return {
        "model": {"name": name} | fingerprint.of_model(model),
        "protocol": protocol,
        "tolerance": plan.tolerance,
        "prompts": {"count": len(asked), "sha256": bench.digest(asked)},
        "rows": rows,
        "smallest": {method: row and row["keep"] for method, row in small.items()},
        "best": bench.best(rows),
        "outside": outside({row["method"] for row in rows}),
        "machine": provenance(model.device),
        "lines": lines,
    }


def _print(found: dict[str, Any]) -> None:
    columns = [("method", "left"), ("keep", "right"), ("held", "right"), ("of full", "right")]
    columns += [("KL", "right"), ("95 %", "right"), ("agreement", "right"), ("evict", "right")]
    columns += [("within", "left")]
    count = found["prompts"]["count"]
    title = f"{count} prompt{'s' * (count > 1)}, {found['protocol']}, tolerance "
    cells = [_cells_of(row) for row in found["rows"]]
    output.table(f"{title}{found['tolerance']:g} nats per token", output.Cells(columns, cells))
    for row in found["rows"]:
        if row["outcome"] != OK:
            _say(f"{row['method']} {row['keep']}: {row['outcome']}: {row['reason']}")
    for method, keep in found["smallest"].items():
        _say(f"{method}: {f'keep {keep}' if keep else 'no budget within tolerance'}")
    _say(_verdict(found))


def _cells_of(row: dict[str, Any]) -> list[str]:
    start = [row["method"], row["keep"]]
    if row["outcome"] != OK:
        return [*start, row["outcome"], *["-"] * 6]
    limits = row["kl_interval"]
    held, full, spent = row["held_bytes"], row["full_bytes"], row["evict_s"]
    return [
        *start,
        output.size(round(held)),
        f"{100 * held / full:.1f}%",
        f"{row['kl']:.4f}",
        f"{limits[0]:.4f} to {limits[1]:.4f}" if limits else "-",
        f"{100 * row['agreement']:.1f}%",
        output.seconds(spent) if spent is not None else "own prefill",
        "yes" if row["within"] else "no",
    ]


def _verdict(found: dict[str, Any]) -> str:
    best, tolerance = found["best"], found["tolerance"]
    if best is None:
        return (
            f"none is within {tolerance:g} nats per token: allow more (--tolerance), or try "
            "larger budgets (--keep 75%) and other methods (kvtrim methods)"
        )
    said = f"best: --method {best['method']} --keep {best['keep']}, KL {best['kl']:.4f}"
    limits, share = best["kl_interval"], best["held_bytes"] / best["full_bytes"]
    said += f" ({limits[0]:.4f} to {limits[1]:.4f})" if limits else " (one prompt)"
    unsure = limits is None or limits[1] > tolerance
    more = "; its interval reaches beyond the tolerance: more prompts would tell" * unsure
    return f"{said}, {100 * share:.1f}% of the full cache{more}"


def _say(text: str) -> None:
    output.out.print(text, markup=False, highlight=False, soft_wrap=True)
