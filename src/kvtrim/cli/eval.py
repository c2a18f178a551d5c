"""`eval`: tasks x methods x budgets, resumable, with the record of the run."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtrim.cli import options, output
from kvtrim.errors import UsageError
from kvtrim.records import RECORD
from kvtrim.records.spec import BATCH, PROTOCOLS, EvalSpec

if TYPE_CHECKING:
    from kvtrim.bench.eval.evaluate import Rows, Subject
    from kvtrim.bench.eval.grid import Grid

PREFILLS = ("once", "each")
METHODS, KEEPS = ("snapkv", "adakv"), ("512",)

Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        "-t",
        help="A benchmark (niah, gsm8k, longbench-qasper), a group of them (longbench, ruler), "
        "one of an installed package, or module:NAME of your own; repeat for several.",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Samples per task. Default: all; 100 where prompts are made."),
]
Lengths = Annotated[
    list[int] | None,
    typer.Option(
        "--length",
        min=64,
        help="Repeat for several, each a run in its own folder of --out. "
        "Tokens of a prompt and its answer, where prompts are made to a length (default 4096 "
        "or the model's window); others longer than that lose the middle of their context.",
    ),
]
Fitting = Annotated[
    bool,
    typer.Option("--fitting", help="Leave out samples of which something would have to be cut."),
]
NewTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="At most so many tokens of an answer. Fewer than its task says is faster, and longer "
        "answers score less than they might; more leaves less room for the prompt. Default: what "
        "the task says.",
    ),
]
TruncateAt = Annotated[
    int | None,
    typer.Option(
        min=16,
        help="Cut as LongBench's own code does: of a prompt of more tokens than this, the chat "
        "template not counted, the first and the last half of so many stay.",
    ),
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat", help="The chat template for all tasks. Default: as each has."
    ),
]
Protocol = Annotated[
    str | None,
    typer.Option(
        help="question-agnostic (compress the context, then read the question) or question-aware "
        "(read both, then compress). Must be given: results differ a lot."
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        envvar="KVTRIM_DATA",
        help="A folder with the rows of the benchmarks. Default: the Hugging Face Hub.",
    ),
]
Seed = Annotated[
    int,
    typer.Option(help="Of prompts that are made. Tasks that have rows ask the first of them."),
]
Batch = Annotated[
    int,
    typer.Option(
        min=1,
        help="Answers that are generated together: methods and budgets of a sample, and samples "
        "of similar length. 1 is slower, and what answering each alone gives to the last bit.",
    ),
]
Prefill = Annotated[
    str,
    typer.Option(
        help="once: read a prompt once for all methods that leave that pass as it is. each: once "
        "for each method and budget. Both give the same."
    ),
]
AllowCode = Annotated[
    bool,
    typer.Option(
        "--allow-code-execution",
        help="Run the programs that the model writes (HumanEval), under bubblewrap (bwrap): "
        "without the network, your files or your environment.",
    ),
]
Unconfined = Annotated[
    bool,
    typer.Option(
        "--unconfined",
        help="With --allow-code-execution, where there is no bubblewrap: such a program can read, "
        "change, delete and send away whatever you can.",
    ),
]
OutFolder = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help="A folder for run.json, inputs.jsonl, samples.jsonl, times.jsonl, scores.jsonl, "
        "eval.json and eval.md. A run that was cut off goes on where it stopped when asked for "
        "again; a finished one takes one more --method or --keep.",
    ),
]


def evaluate(
    task: Tasks = None,
    method: options.Methods = None,
    keep: options.Keeps = None,
    protocol: Protocol = None,
    limit: Limit = None,
    length: Lengths = None,
    fitting: Fitting = False,
    max_new_tokens: NewTokens = None,
    chat: Chat = None,
    truncate_at: TruncateAt = None,
    data: Data = None,
    out: OutFolder = None,
    seed: Seed = 0,
    set_: options.Set = None,
    batch: Batch = BATCH,
    prefill: Prefill = "once",
    prefill_chunk: options.Chunk = None,
    allow_code_execution: AllowCode = False,
    unconfined: Unconfined = False,
    model: options.Model = "smollm2",
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    allow_untested: options.AllowUntested = False,
    json: options.Json = False,
) -> None:
    """Measure what methods cost in answers: benchmark scores, likelihood of the right answer, KL.

    The full cache is always measured beside them, on the same samples.
    """
    from kvtrim.bench.eval import scores
    from kvtrim.bench.eval.grid import Grid

    options.require_choice("--prefill", prefill, PREFILLS)
    lengths = dict.fromkeys(length or [None])
    spec = EvalSpec(
        protocol=_protocol(protocol),
        limit=limit,
        length=next(iter(lengths)),
        seed=seed,
        batch=batch,
        fitting=fitting,
        max_new_tokens=max_new_tokens,
        chat=chat,
        truncate_at=truncate_at,
        prefill_chunk=prefill_chunk,
    )
    settings = options.parse_settings(set_)
    grid = Grid.of(task or [], method or METHODS, keep or KEEPS, settings, spec)
    if out is not None:
        options.require_folder(out)
    scores.require_programs(grid.tasks, allow_code_execution, unconfined)
    rows = _rows(data)
    from kvtrim.bench.eval.evaluate import Subject, read

    read(grid, rows)
    subject = Subject(model, *options.load(model, device, dtype, threads, allow_untested))
    grids = [replace(grid, length=each) for each in lengths]
    for one in grids:
        subject.encoder(one.length)  # refuses what is too long before the first is measured
    with _folder(out) as folder:
        found = {}
        for one in grids:
            place = folder if len(grids) == 1 else _inner(folder, one)
            _run(subject, one, rows, place, prefill == "once")
            found[str(one.length)] = _finish(place, one, allow_code_execution, unconfined)
        _show(grid, found, json)


def _protocol(protocol: str | None) -> str:
    """It must be given, since results differ a lot."""
    if protocol not in PROTOCOLS:
        named = "is missing" if protocol is None else f"{protocol} is unknown"
        raise UsageError(f"--protocol {named}: use {' or '.join(PROTOCOLS)}")
    return protocol


def _rows(data: Path | None) -> "Rows":
    from kvtrim.tasks.rows import reader

    return reader(data)


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """The folder asked for, or one that is thrown away."""
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="kvtrim-eval-") as name:
        yield Path(name) / "run"


def _run(subject: "Subject", grid: "Grid", rows: "Rows", folder: Path, once: bool) -> None:
    from kvtrim.bench.eval.evaluate import evaluate as run

    with output.progress(left=True) as report:
        run(subject, grid, rows, folder, once, report)


def _inner(folder: Path, grid: "Grid") -> Path:
    """The folder of one of several lengths."""
    from kvtrim import files

    if (folder / RECORD).exists():
        raise UsageError(f"{folder} holds a run of one length; name another folder for several")
    files.make_folder(folder, parents=True)
    return folder / f"length-{grid.length}"


def _finish(
    folder: Path, grid: "Grid", allow_code_execution: bool, unconfined: bool
) -> dict[str, Any]:
    """Scores and tables of a run."""
    import json as library

    from kvtrim.bench.eval import scores

    scores.derive(folder, grid.tasks, allow_code_execution, unconfined)
    return library.loads((folder / scores.TABLE).read_text("utf-8"))


def _show(grid: "Grid", found: dict[str, dict[str, Any]], json: bool) -> None:
    """The table of every length, and what was refused."""
    from kvtrim.bench.eval import scores

    if json:
        output.print_json(found if len(found) > 1 else next(iter(found.values())))
        return
    for length, made in found.items():
        title = f"{grid.protocol}, {length} tokens" if len(found) > 1 else grid.protocol
        output.table(title, scores.cells(made["rows"]), wide=True)
        output.lines([*made["without_samples"], *made["refused"]])
