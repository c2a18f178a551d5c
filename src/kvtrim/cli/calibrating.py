"""`calibrate`: what a method needs to have measured once per model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvtrim.cli import options, output

if TYPE_CHECKING:
    from kvtrim.bench.heads import Measured

SCORES = ("reason", "copy")
PUZZLES = ("two-step", "one-step", "contrast")

group = typer.Typer(
    help="Measure once per model what a method needs.", no_args_is_help=True, add_completion=False
)

Out = Annotated[Path, typer.Option("--out", "-o", help="The table; its record goes beside it.")]
Score = Annotated[
    str,
    typer.Option(
        help="reason: attention to the sentence that answers a puzzle (R2). copy: the answer's "
        "tokens copied from the place looked at most (R)."
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
    """Measure which heads find what is asked for, and write the table that headkv reads."""
    options.require_choice("--score", score, SCORES)
    options.require_choice("--puzzle", puzzle, PUZZLES)
    options.require_writable(out)
    text = None if haystack is None else options.read_text(haystack)
    loaded, tokenizer = options.load(model, device, dtype, threads)
    from kvtrim.bench.heads import Plan, measure, record
    from kvtrim.budgets import head_scores

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
        _print(out, measured, prompts)


def _print(out: Path, measured: "Measured", prompts: int) -> None:
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
    output.table("strongest heads", columns, rows)
    output.out.print(f"use it: --method headkv --set table={out}", markup=False, highlight=False)
