"""The figures of docs/choosing.md and README's picture, from records that are committed.

    python experiments/choosing.py

Fills the parts between `<!-- figures:NAME -->` and `<!-- /figures -->` of docs/choosing.md and
draws docs/pictures/quality.svg. Measures nothing: it reads quality/, overhead/, probe_cost/,
fast_prefill/, echo_prefill/, decode_pairs/, echo/ and chunked_memory/, and kvtrim's configs of
published models.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from math import sqrt
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from kvtrim import files
from kvtrim.report.plots import tradeoff

HERE = Path(__file__).parent
ROOT = HERE.parent
PAGE = ROOT / "docs" / "choosing.md"
PICTURE = ROOT / "docs" / "pictures" / "quality.svg"
CONFIGS = ROOT / "src" / "kvtrim" / "hf" / "models" / "configs"
PROTOCOLS = ("question-aware", "question-agnostic")
DRAWN = ("auto", "kvzip", "headkv", "adakv", "snapkv", "fastkv", "h2o", "streaming-llm", "random")
KEEPS = (512, 256)
LENGTHS = (8192, 32768, 131072)
SHARES = (0.25,)
POSITION = 4  # bytes that the store holds beside keys and values of an entry
Row = dict[str, Any]


def records(name: str) -> Any:
    """What stands in a record of this folder."""
    path = HERE / name
    return (
        [row for _, row in files.lines_of(path)]
        if path.suffix == ".jsonl"
        else files.json_of(path)
    )


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error."""
    return mean(values), stdev(values) / sqrt(len(values))


def quality() -> dict[tuple[str, str, int], tuple[float, float, float]]:
    """(protocol, method, keep): share of the full cache held, loss and its standard error."""
    found: dict[tuple[str, str, int], list[Row]] = defaultdict(list)
    for row in records("quality/quality.jsonl"):
        found[row["protocol"], row["method"], row["keep"]].append(row)
    return {
        key: (
            sum(row["held_bytes"] for row in rows) / sum(row["full_bytes"] for row in rows),
            *spread([row["loss"] for row in rows]),
        )
        for key, rows in found.items()
    }


def panels() -> dict[str, dict[str, list[tuple[float, float, float]]]]:
    """What the picture shows."""
    measured = quality()
    return {
        protocol: {
            method: [
                point for (p, m, _), point in measured.items() if (p, m) == (protocol, method)
            ]
            for method in DRAWN
        }
        for protocol in PROTOCOLS
    }


def losses() -> str:
    """Every method of the quality table at two budgets, the best first."""
    measured = quality()
    methods = {m for p, m, _ in measured if all((p, m, k) in measured for k in KEEPS)} - {"full"}
    cells = [(protocol, keep) for protocol in PROTOCOLS for keep in KEEPS]
    head = ["method", *(f"{p}, 1/{2048 // k}" for p, k in cells)]
    best = {cell: min(measured[cell[0], m, cell[1]][1] for m in methods) for cell in cells}

    def cell(method: str, protocol: str, keep: int) -> str:
        held, loss, error = measured[protocol, method, keep]
        text = f"{loss:.2f} ± {error:.2f}"
        bold = loss == best[protocol, keep]
        return f"{f'**{text}**' if bold else text} ({held:.0%})"

    ordered = sorted(methods, key=lambda m: measured[PROTOCOLS[1], m, KEEPS[1]][1])
    return table(head, ([m, *(cell(m, *c) for c in cells)] for m in ordered))


def token_bytes(config: Row, itemsize: int = 2) -> int:
    """Bytes of one token's keys and values in all layers, in a full cache."""
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * width * itemsize


def held_bytes(config: Row, entries: int, itemsize: int = 2) -> int:
    """Bytes of so many entries per KV head in kvtrim's store, their positions included."""
    heads = config["num_hidden_layers"] * config["num_key_value_heads"]
    return entries * (token_bytes(config, itemsize) + POSITION * heads)


def memory() -> str:
    """What one prompt holds of published models in bfloat16: full, and a quarter of it."""
    head = ["model", "per token"]
    for length in LENGTHS:
        shares = (f"1/{1 / share:.0f}" for share in SHARES)
        head += [f"{length // 1024}k, full", *(f"keep {share}" for share in shares)]
    rows = []
    for path in sorted(CONFIGS.glob("*.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        row = [config["source"], f"{token_bytes(config) / 1024:.0f} KiB"]
        for length in LENGTHS:
            fits = length <= config["max_position_embeddings"]
            sizes = [token_bytes(config) * length]
            sizes += [held_bytes(config, int(length * share)) for share in SHARES]
            row += [f"{size / 2**30:.2f} GiB" if fits else "-" for size in sizes]
        rows.append(row)
    return table(head, rows)


def figures() -> dict[str, Callable[..., str]]:
    """What the lines of `SITUATIONS` may quote, by name."""
    measured = quality()
    overhead = {row["method"]: row["share"] for row in records("overhead/overhead.json")}
    probe = {row["method"]: row for row in records("probe_cost/probe_cost.json")["rows"]}
    runs = records("fast_prefill/prefill_4000_seven.json")["runs"]["4000"]
    echo_runs = records("echo_prefill/prefill.json")["runs"]["4000"]
    decode = {row["method"]: row for row in records("decode_pairs/decode_pairs.json")["rows"]}
    foretold = records("echo/echo.jsonl")
    chunked = records("chunked_memory/chunked_memory.json")["rows"]

    def loss(protocol: str, method: str, keep: int) -> str:
        return f"{measured[f'question-{protocol}', method, keep][1]:.2f}"

    def prefill(name: str, of: dict[str, list[Row]] = runs) -> float:
        pairs = zip(of[name], of["transformers"], strict=True)
        return median(one["wall_s"] / plain["wall_s"] for one, plain in pairs)

    def divergence(cell: str, part: int) -> str:
        rows = [row["kl"] for row in foretold if (row["cell"], row["share"]) == (cell, part)]
        return f"{mean(rows):.2f}"

    def spent(cell: str) -> float:
        return mean(row["s"] for row in foretold if row["cell"] == cell)

    def peak(method: str, length: int) -> str:
        row = next(r for r in chunked if (r["method"], r["length"]) == (method, length))
        return f"{row['peak_bytes'] / 2**20:.0f} MiB"

    return {
        "loss": loss,
        "cost": lambda method: f"{overhead[method]:.0%}",
        "probe": lambda: f"{probe['kvzip']['probe_process']:.1f}",
        "prefill": lambda name: f"{prefill(name):.2f}",
        "more": lambda name: f"{prefill(name, echo_runs) - 1:.0%}",
        "slower": lambda method: f"{decode[method]['to_snapkv'] - 1:.0%}",
        "divergence": divergence,
        "times": lambda cell, other: f"{spent(cell) / spent(other):.1f}",
        "peak": peak,
    }


QUALITY = "[quality](../experiments/quality/quality.md)"
SITUATIONS = (
    (
        "The question is known when the text is read",
        "`auto`, which is `echo-window:refit=values+bias` where there is a table of echo, else "
        "`headkv` with one of the model's heads, else `adakv`",
        "1/8",
        "{cost:headkv} of a prefill, with echo-window and its refit "
        "[{more:echo, values and biases, 25%}](../experiments/echo_prefill/prefill.md)",
        "loss {loss:aware|auto|256}, {loss:aware|headkv|256} and {loss:aware|adakv|256}; random "
        "eviction "
        f"{{loss:aware|random|256}} ({QUALITY}, "
        "[overhead](../experiments/overhead/overhead.md))",
    ),
    (
        "A document is compressed before its questions are known, and may be read twice",
        "`kvzip`, with `--set refit=values+bias` (both: `auto` without a table)",
        "1/4 to 1/8",
        "{probe} prefills more",
        "loss {loss:agnostic|kvzip|512} at 1/4, {loss:agnostic|kvzip|256} at 1/8; adakv "
        f"{{loss:agnostic|adakv|512}} and {{loss:agnostic|adakv|256}} ({QUALITY}, "
        "[probe](../experiments/probe_cost/probe_cost.json)). Where time does not matter, "
        "`kvgrad`, which takes {times:kvgrad|kvzip-plus} times as long as `kvzip-plus`: KL "
        "{divergence:kvgrad|16} at 1/16 and {divergence:kvgrad|8} at 1/8, with the refit "
        "{divergence:kvgrad, values and biases|16} and {divergence:kvgrad, values and biases|8}, "
        "beside kvzip's {divergence:kvzip|16} and {divergence:kvzip|8} "
        "([echo](../experiments/echo/echo.md))",
    ),
    (
        "The same, and it may be read only once",
        "`echo` with `--set refit=values+bias` (both: `auto` with a table: `kvtrim calibrate "
        "echo`, once per model), or `headkv` (`kvtrim calibrate heads`)",
        "1/4",
        "[{more:echo, values and biases, 25%}](../experiments/echo_prefill/prefill.md) of a "
        "prefill more",
        "loss {loss:agnostic|auto|512} at 1/4, {loss:agnostic|auto|256} at 1/8; headkv's "
        "{loss:agnostic|headkv|512} and "
        f"{{loss:agnostic|headkv|256}} ({QUALITY}). "
        "echo's KL {divergence:echo|4} at 1/4, {divergence:echo|8} at 1/8, beside kvzip's "
        "{divergence:kvzip|4} and {divergence:kvzip|8}, and "
        "{divergence:echo, values and biases|4} and "
        "{divergence:echo, values and biases|8} with the refit (25 prompts, "
        "[echo](../experiments/echo/echo.md))",
    ),
    (
        "No table, no second reading, no question",
        "`adakv`; below half of the cache nothing of this kind is good",
        "1/2",
        "{cost:adakv} of a prefill",
        "loss {loss:agnostic|adakv|1024} at 1/2, {loss:agnostic|adakv|512} at 1/4 "
        f"({QUALITY})",
    ),
    (
        "A chat or stream without end, in which the recent text matters",
        "`streaming-llm`, `preset=bounded`",
        "what fits",
        "{cost:streaming-llm} of a prefill; the cache never grows",
        "what has left the window is gone: loss {loss:aware|streaming-llm|256} at 1/8 where the "
        f"answer may stand anywhere ({QUALITY})",
    ),
    (
        "A long generation from a prompt that fits",
        "a method that cuts the prompt, with `schedule=every-64` to cut what is generated too",
        "1/4",
        "a token costs what is held: adakv's heads of different lengths {slower:adakv} more than "
        "snapkv's of one",
        "[decode](../experiments/decode_pairs/decode_pairs.md); answers to long generations were "
        "not measured here",
    ),
    (
        "The prefill takes too long, and the question is known",
        "`fastkv`",
        "1/4",
        "{prefill:fastkv, 512, T = 512} of plain transformers' prefill",
        "loss {loss:aware|fastkv|512} at 1/4; without the question "
        f"{{loss:agnostic|fastkv|512}} ({QUALITY}, "
        "[prefill](../experiments/fast_prefill/README.md))",
    ),
    (
        "A prompt longer than memory allows",
        "`echo` or `snapkv` with `--prefill-chunk 2048 --set chunks=true`",
        "what fits",
        "a prefill; its memory no longer depends on the length",
        "peak {peak:snapkv|8192} at 8,192 tokens and {peak:snapkv|32768} at 32,768; the full "
        "cache {peak:full|32768} ([memory](../experiments/chunked_memory/chunked_memory.md))",
    ),
)


def said(text: str, known: dict[str, Callable[..., str]]) -> str:
    """A text with its `{name:argument|argument}` replaced by figures."""

    def figure(match: re.Match[str]) -> str:
        given = [int(one) if one.isdigit() else one for one in filter(None, match[2].split("|"))]
        return known[match[1]](*given)

    return re.sub(r"\{(\w+):?([^}]*)\}", figure, text)


def situations() -> str:
    """What to use when."""
    known = figures()
    head = ("when", "method", "keep", "it costs", "measured")
    return table(head, ([said(cell, known) for cell in row] for row in SITUATIONS))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def filled(page: str) -> str:
    """The page with its tables of today."""
    tables = {"situations": situations(), "losses": losses(), "memory": memory()}
    for name, made in tables.items():
        begin, mark, after = page.partition(f"<!-- figures:{name} -->\n")
        if not mark:
            raise SystemExit(f"{PAGE} has no place for the figures of {name}")
        end = after.partition("<!-- /figures -->")[2]
        page = f"{begin}{mark}\n{made}\n<!-- /figures -->{end}"
    return page


def main() -> None:
    """Fill the page and draw the picture."""
    files.replace(PAGE, filled(files.text_of(PAGE)).encode())
    lost = "log-likelihood of the right answer lost, nats per token"
    picture = tradeoff.draw(panels(), "held, % of the full cache's bytes (measured)", lost)
    files.replace(PICTURE, picture)


if __name__ == "__main__":
    main()
