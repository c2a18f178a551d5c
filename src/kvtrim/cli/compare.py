"""`compare`: one question, the full cache and several methods side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtrim.cli import options, output
from kvtrim.cli.ask import EMPTY
from kvtrim.cli.results import record
from kvtrim.errors import UsageError

if TYPE_CHECKING:
    from kvtrim.api import Result
    from kvtrim.bench.candidates import Candidate
    from kvtrim.bench.comparison import Comparison


Html = Annotated[
    Path | None,
    typer.Option("--html", help="Also show what was kept, as `kvtrim view` does, in this file."),
]
Evidence = Annotated[
    list[str] | None,
    typer.Option(
        "--evidence",
        help="A text of the document that an answer needs, marked where it is lost; repeat for "
        "several. Default: the answer's own words, where they stand in the document.",
    ),
]


def compare(
    document: options.Document = None,
    library: options.Library = None,
    question: options.Questions = None,
    method: options.Methods = None,
    keep: options.Keeps = None,
    set_: options.Set = None,
    html: Html = None,
    evidence: Evidence = None,
    max_new_tokens: options.NewTokens = 48,
    protocol: options.OneProtocol = "question-aware",
    chat: options.Chat = None,
    system: options.System = None,
    truncate: options.Truncate = "error",
    shots_separator: options.Shots = None,
    prefill_chunk: options.Chunk = None,
    model: options.Model = "smollm2",
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    allow_untested: options.AllowUntested = False,
    json: options.Json = False,
) -> None:
    """Ask one question with the full cache and with several methods and budgets, side by side."""
    questions = options.read_questions(question)
    methods, keeps = method or ["auto", "snapkv"], keep or ["512"]
    if len(questions) > 1:
        raise UsageError("compare asks one question; use ask for several")
    if html is not None:
        options.require_writable(html)
    elif evidence:
        raise UsageError("--evidence is marked in the page: give --html FILE as well")
    chosen: dict[str, Any] = dict(
        protocol=options.choose("--protocol", protocol, options.PROTOCOLS),
        truncate=options.choose("--truncate", truncate, options.TRUNCATE),
    )
    cells = cells_of(methods, keeps, set_, prefill_chunk)
    text = options.read_document(document, shots_separator, library)
    loaded, tokenizer = options.load(model, device, dtype, threads, allow_untested)
    from kvtrim.bench import candidates

    candidates.require_support(loaded, cells)
    with output.progress() as report:
        _warm_up(loaded, tokenizer)
        from kvtrim.bench.comparison import Comparison

        comparison = Comparison(
            loaded,
            tokenizer,
            text,
            questions[0],
            cells,
            max_new_tokens=max_new_tokens,
            chat=chat,
            system=system,
            prefill_chunk=prefill_chunk,
            **chosen,
        )

        def progress_of(cell: "Candidate") -> Any:
            label = f"{cells.index(cell) + 1} of {len(cells)}: {cell.said}"
            return lambda what, done, out_of: report(f"{label}, {what}", done, out_of)

        if html is None:
            results = comparison.results(progress_of)
        else:
            from kvtrim.bench.kept import Showing

            showing = Showing(loaded, tokenizer, comparison, questions[0])
            showing.require_evidence(evidence or ())
            results = showing.results(progress_of)
            showing.exhibit(model, evidence or ()).save(html)
    _print_comparison(comparison, results, questions[0], json)
    if html is not None:
        output.note(f"{html} shows what was kept: {output.size(html.stat().st_size)}")


def cells_of(
    methods: list[str], keeps: list[str], set_: list[str] | None, prefill_chunk: int | None
) -> list["Candidate"]:
    """Every method with every budget, checked before anything runs; the full cache first, once."""
    from kvtrim.bench.candidates import PLAIN, candidates

    chosen = candidates(["full", *methods], keeps, options.parse_settings(set_))
    cells = [cell for cell in chosen if cell.method != PLAIN]
    for cell in cells:
        cell.request.method.require_passes(prefill_chunk)
    return cells


def _warm_up(model: Any, tokenizer: Any) -> None:
    """A short answer that is not counted, since the first pass over a model is the slowest."""
    from kvtrim.api import generate

    generate(model, tokenizer, "warm up " * 8, "?", method="full", max_new_tokens=4)


def _print_comparison(
    comparison: "Comparison", results: list["Result"], question: str, json: bool
) -> None:
    if json:
        shared = {"shared_reading_s": comparison.reading_s}
        output.print_json([record(result, question) | shared for result in results])
        return
    first = results[0]
    columns = [("method", "left"), ("keep", "right")]
    columns += [(name, "right") for name in ("first token", "per token", "held", "of full")]
    columns += [("entries per head, layers left to right", "left")]
    rows = [
        [
            result.method,
            _keep(result),
            output.seconds(result.ttft_s),
            output.seconds(result.tpot_s),
            output.size(result.held_bytes),
            f"{100 * result.held_bytes / result.full_bytes:.1f}%",
            output.entries(result.kept),
        ]
        for result in results
    ]
    output.table(
        f"{first.prompt_tokens} prompt tokens, {first.protocol}", output.Cells(columns, rows)
    )
    answers = [[r.method, _keep(r), " ".join(r.text.split()) or EMPTY] for r in results]
    columns = [("method", "left"), ("keep", "right"), ("answer", "left")]
    output.table(question, output.Cells(columns, answers))
    _remarks(results)
    _explain_first_token(comparison)


def _explain_first_token(comparison: "Comparison") -> None:
    """What the seconds to the first token are made of."""
    alone, seconds = sorted({cell.label for cell in comparison.alone}), comparison.reading_s
    if seconds is None:
        return
    but = f" but {', '.join(alone)}, which read it for themselves" if alone else ""
    output.note(
        f"the prompt was read once, in {output.seconds(seconds)}, for all methods{but}; first "
        "token is that reading and what each did after it. `kvtrim speed` measures whole runs"
    )


def _remarks(results: list["Result"]) -> None:
    for result in results:
        if result.remark:
            output.note(f"{result.method}: {result.remark}")


def _keep(result: "Result") -> str:
    return "all" if result.method == "full" else result.keep
