"""`calibrate`: what a method needs to have measured once per model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtrim.cli import options, output
from kvtrim.errors import UsageError

if TYPE_CHECKING:
    from kvtrim.bench.calibrate.echo import Fitted
    from kvtrim.bench.calibrate.heads import Measured

SCORES = ("reason", "copy", "kvzip")
TARGETS = ("kvzip", "kvzip-plus", "kvgrad")
PUZZLES = ("two-step", "one-step", "contrast")

group = typer.Typer(
    help="Measure once per model what a method needs.", no_args_is_help=True, add_completion=False
)

Out = Annotated[Path, typer.Option("--out", "-o", help="The table; its record goes beside it.")]
Score = Annotated[
    str,
    typer.Option(
        help="reason: attention to the sentence that answers a puzzle (R2). copy: the answer's "
        "tokens copied from the place looked at most (R). kvzip: KVzip's scores, for kvzip-head."
    ),
]
Puzzle = Annotated[
    str, typer.Option(help="Of the reason score: two-step, one-step, or contrast (easiest).")
]
Prompts = Annotated[int, typer.Option(min=1, help="Prompts; those answered right count.")]
Lengths = Annotated[
    list[int] | None,
    typer.Option("--length", min=1, help="Tokens of a prompt; repeat for several, used in turn."),
]
Haystack = Annotated[
    str | None, typer.Option(help="A text file to hide needles in. Default: generated filler.")
]
Seed = Annotated[int, typer.Option(help="Other needles, filler and places.")]
Curve = Annotated[Path, typer.Option("--out", "-o", help="The table; a PNG goes beside it.")]
Tokens = Annotated[
    str, typer.Option(help="How many tokens go on: a share of the prompt (0.2) or a number.")
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        min=0, help="A relative distance that is small enough. Default: the middle layer's."
    ),
]
Measuring = Annotated[int, typer.Option(min=1, help="Prompts to measure with.")]
Length = Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")]
Texts = Annotated[
    str | None,
    typer.Option(
        "--prompts-file",
        help="Your own prompts, one a line (\\n is a line break). Default: generated ones.",
    ),
]


Maps = Annotated[
    Path, typer.Option("--out", "-o", help="The table; its record and a PNG go beside it.")
]
Foretold = Annotated[
    str,
    typer.Option(
        "--target",
        help="Whose scores are foretold: kvzip, kvzip-plus, or kvgrad, which takes longer.",
    ),
]
Reading = Annotated[
    list[Path] | None,
    typer.Option(
        "--texts",
        help="A text file to fit on; repeat for several. Default: Python's documentation and "
        "modules, made records, and texts that the model writes itself.",
    ),
]
Amount = Annotated[int, typer.Option("--tokens", min=128, help="Tokens to read in all.")]
Piece = Annotated[int, typer.Option("--length", min=64, help="Tokens of one text at most.")]


@group.callback()
def calibrate() -> None:
    """Say that this is a group, however few commands it has."""


@group.command("heads")
def heads(
    out: Out,
    score: Score = "reason",
    puzzle: Puzzle = "two-step",
    prompts: Prompts = 24,
    length: Lengths = None,
    haystack: Haystack = None,
    seed: Seed = 0,
    chat: options.Chat = None,
    model: options.Model = "smollm2",
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Measure which heads matter, and write the table that headkv and duoattention read."""
    options.require_choice("--score", score, SCORES)
    options.require_choice("--puzzle", puzzle, PUZZLES)
    options.require_writable(out)
    text = None if haystack is None else options.read_text(haystack)
    loaded, tokenizer = options.load(model, device, dtype, threads)
    from kvtrim.bench.calibrate.heads import Plan, measure, record
    from kvtrim.methods.budgets import head_scores

    plan = Plan(
        score=score,  # pyright: ignore[reportArgumentType] (checked above)
        puzzle=puzzle,  # pyright: ignore[reportArgumentType]
        prompts=prompts,
        lengths=tuple(length or Plan.lengths),
        seed=seed,
        chat=chat,
    )
    with output.progress() as report:
        measured = measure(loaded, tokenizer, plan, text, report)
    written = record(loaded, tokenizer, model, plan, text, measured)
    head_scores.write(out, measured.table, written)
    if measured.misled > measured.counted / 2:
        output.err.print(
            f"{measured.misled} answers were the puzzle's wrong one: the model is guessing; try "
            "an easier --puzzle",
            highlight=False,
        )
    if json:
        output.print_json(
            {"file": str(out), "record": str(head_scores.record_path(out))} | written
        )
    else:
        _print(out, measured, prompts, score)


def _print(out: Path, measured: "Measured", prompts: int, score: str) -> None:
    scores = measured.means().flatten().tolist()
    best = sorted(range(len(scores)), key=lambda at: -scores[at])[:8]
    rows = [
        [
            f"{at // measured.heads}-{at % measured.heads}",
            f"{scores[at]:.3f}",
            f"{100 * scores[at] / sum(scores):.1f}%",
        ]
        for at in best
    ]
    output.out.print(
        f"{out}: {measured.layers} layers of {measured.heads} query heads, {measured.counted} of "
        f"{prompts} prompts counted, {sum(score > 0 for score in scores)} heads score above 0",
        markup=False,
        highlight=False,
    )
    columns = [("layer-head", "left"), ("mean score", "right"), ("of all scores", "right")]
    output.table("strongest heads", output.Cells(columns, rows))
    reader = "kvzip-head" if score == "kvzip" else "headkv"
    output.out.print(f"use it: --method {reader} --set table={out}", markup=False, highlight=False)


@group.command("tsp")
def tsp(
    out: Curve = Path("tsp.json"),
    tokens: Tokens = "0.2",
    tolerance: Tolerance = None,
    prompts: Measuring = 8,
    length: Length = 2000,
    prompts_file: Texts = None,
    seed: Seed = 0,
    chat: options.Chat = None,
    model: options.Model = "smollm2",
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Find the layer after which fastkv may leave most tokens behind; a table and a plot."""
    options.require_writable(out)
    picture = out.with_suffix(".png")
    if picture == out:
        raise UsageError(f"{out} is the table, and its plot gets that name; write to a .json file")
    texts = None if prompts_file is None else _lines(options.read_text(prompts_file))
    from kvtrim.bench.calibrate import tsp as bench
    from kvtrim.report.plots import tsp as tsp_plot

    amount = bench.amount_of(tokens)
    plan = bench.Plan(amount, prompts, length, seed, tolerance, chat)
    loaded, tokenizer = options.load(model, device, dtype, threads)
    ids = bench.prompts(loaded, tokenizer, plan, texts)
    with output.progress() as report:
        curve = bench.measure(loaded, ids, amount, report)
    found = bench.table(loaded, tokenizer, model, plan, ids, curve, texts)
    bench.write(out, found)
    drawn: Path | None = picture
    try:
        tsp_plot.draw(found, picture)
    except UsageError as error:
        drawn = None
        output.err.print(f"{out} is written; no plot: {error}", markup=False, highlight=False)
    if json:
        files = {"file": str(out), "plot": None if drawn is None else str(drawn)}
        output.print_json(files | found)
    else:
        _print_curve(out, drawn, found)


def _lines(text: str) -> list[str]:
    return [line.replace("\\n", "\n") for line in text.splitlines() if line.strip()]


def _print_curve(out: Path, picture: Path | None, found: dict[str, Any]) -> None:
    columns = ("mass", "later", "overlap", "distance", "kl")
    rows = [
        [
            f"{point['layer']}{' *' if point['layer'] == found['layer'] else ''}",
            *(f"{point[name]:.3g}" for name in columns),
        ]
        for point in found["curve"]
    ]
    headings = [("layer", "left"), *((name, "right") for name in columns)]
    prompts = found["record"]["prompts"]
    output.table(f"propagation after each layer, {prompts} prompts", output.Cells(headings, rows))
    use = f"use it: --method fastkv --set layer={found['layer']}"
    where = f"{out}" if picture is None else f"{out}, {picture}"
    for line in (f"* {found['rule']} ({found['limit']:.3g})", where, use):
        output.out.print(line, markup=False, highlight=False, soft_wrap=True)


@group.command("echo")
def echo(
    out: Maps = Path("echo.safetensors"),
    target: Foretold = "kvzip",
    texts: Reading = None,
    tokens: Amount = 20_000,
    length: Piece = 1200,
    seed: Seed = 0,
    chat: options.Chat = None,
    model: options.Model = "smollm2",
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Fit the map by which echo foretells a probe's scores: a table, its record and a plot."""
    options.require_choice("--target", target, TARGETS)
    options.require_writable(out)
    if out.suffix != ".safetensors":
        raise UsageError(f"{out}: an echo table is a safetensors file, so call it that")
    given = {path.name: options.read_text(str(path)) for path in texts or []}
    loaded, tokenizer = options.load(model, device, dtype, threads)
    from kvtrim.bench.calibrate import echo as bench
    from kvtrim.bench.calibrate import echo_texts
    from kvtrim.methods import echo_tables
    from kvtrim.report.plots import echo as echo_plot

    plan = bench.Plan(target, tokens, length, seed, chat)  # pyright: ignore[reportArgumentType]
    with output.progress() as report:
        if not given:
            own = echo_texts.write(loaded, tokenizer, length, seed, report)
            given = echo_texts.mix(own, echo_texts.compose(length, seed))
        fitted = bench.fit(loaded, tokenizer, plan, given, report)
    written = bench.fit_record(loaded, tokenizer, model, plan, fitted)
    echo_tables.write(out, fitted.table, written)
    picture: Path | None = out.with_suffix(".png")
    try:
        echo_plot.draw(written, out.with_suffix(".png"))
    except UsageError as error:
        picture = None
        output.err.print(f"{out} is written; no plot: {error}", markup=False, highlight=False)
    if json:
        beside = {"file": str(out), "record": str(echo_tables.record_path(out))}
        output.print_json(beside | {"plot": None if picture is None else str(picture)} | written)
    else:
        _print_fit(out, picture, fitted, written)


_WITH = {"end": "where the end is known", "asked": "and with queries that were asked"}


def _print_fit(out: Path, picture: Path | None, fitted: "Fitted", written: dict[str, Any]) -> None:
    explained = fitted.explained
    rows = [
        [str(layer), *(f"{x:.2f}" for x in own)] for layer, own in enumerate(explained.tolist())
    ]
    heads = [(f"head {number}", "right") for number in range(explained.shape[1])]
    output.table("R^2 on held-out texts", output.Cells([("layer", "right"), *heads], rows))
    where = f"{out}" if picture is None else f"{out}, {picture}"
    summary = (
        f"{written['read']:,} tokens of {len(fitted.texts)} texts, ridge {fitted.ridge:g}, mean "
        f"R^2 {float(explained.mean()):.3f}"
        + "".join(f", {_WITH[name]} {float(x.mean()):.3f}" for name, x in fitted.second.items())
    )
    for line in (summary, where, f"use it: --method echo --set table={out}"):
        output.out.print(line, markup=False, highlight=False, soft_wrap=True)
