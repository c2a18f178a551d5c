"""`analyze`: the figures of papers on a model and prompts of one's own, each with its table."""

import importlib.util
import json as library
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtrim.cli import options, output
from kvtrim.errors import UsageError
from kvtrim.records.spec import AGNOSTIC, AWARE, PROTOCOLS

if TYPE_CHECKING:
    from kvtrim.bench.analyses.base import Analysis, OfFolders, OfPrompts
    from kvtrim.report.findings import Finding

Name = Annotated[
    str | None, typer.Argument(help="Which analysis. Without a name all of them are listed.")
]
Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[FILE|DIR]...",
        help="Text files (- is standard input), or folders of eval and speed.",
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option("--task", "-t", help="Take the prompts of a benchmark; repeat for several."),
]
Data = Annotated[
    Path | None,
    typer.Option(
        envvar="KVTRIM_DATA",
        help="A folder with the rows of the benchmarks. Default: the Hugging Face Hub.",
    ),
]
Limit = Annotated[int, typer.Option(min=1, help="Prompts of each task.")]
Lengths = Annotated[
    list[int] | None,
    typer.Option(
        "--length",
        min=16,
        help="Tokens of a prompt at most: longer ones lose their middle. Some analyses take "
        "several.",
    ),
]
Question = Annotated[
    str | None, typer.Option("--question", "-q", help="What a text file is asked.")
]
Protocol = Annotated[
    str | None,
    typer.Option(
        help="question-aware (default where there is a question) or question-agnostic: only the "
        "context is looked at."
    ),
]
Rates = Annotated[
    list[float] | None,
    typer.Option(
        "--rate",
        min=0.001,
        max=1,
        help="Share of the tokens that count as important or go on (0.2). Some take several.",
    ),
]
Layers = Annotated[
    list[int] | None,
    typer.Option("--layer", min=0, help="Look at this layer; repeat for several."),
]
Window = Annotated[int, typer.Option(min=1, help="How many last queries are asked.")]
Seed = Annotated[int, typer.Option(help="Of prompts that are made, and of what is drawn.")]
OutFolder = Annotated[
    Path, typer.Option("--out", "-o", help="Where NAME.json, NAME.md and NAME.png go.")
]
Svg = Annotated[bool, typer.Option("--svg", help="Write the picture as SVG.")]

_OPTIONS = {  # of the command line -> which of `Analysis.uses` lets it act
    "method": "methods",
    "set_": "methods",
    "keep": "keeps",
    "rate": "rate",
    "layer": "layer",
    "window": "window",
}
_OF_PROMPTS = ("task", "data", "limit", "length", "question", "protocol", "chat", "seed")
_OF_MODELS = ("model", "device", "dtype", "threads", "allow_untested")
_LISTED = [("name", "left"), ("paper", "left"), ("reads", "left"), ("its figure", "left")]


def analyze(
    context: typer.Context,
    name: Name = None,
    sources: Sources = None,
    task: Tasks = None,
    data: Data = None,
    limit: Limit = 1,
    length: Lengths = None,
    question: Question = None,
    protocol: Protocol = None,
    method: options.Methods = None,
    keep: options.Keeps = None,
    set_: options.Set = None,
    rate: Rates = None,
    layer: Layers = None,
    window: Window = 32,
    seed: Seed = 0,
    chat: options.Chat = None,
    out: OutFolder = Path("analysis"),
    svg: Svg = False,
    model: options.Model = "smollm2",
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    allow_untested: options.AllowUntested = False,
    json: options.Json = False,
) -> None:
    """Draw a figure of a paper anew, on any model and prompt, with its table.

    kvtrim analyze overlap report.txt; kvtrim analyze heatmap -t gsm8k-8 -t csqa-4;
    kvtrim analyze friedman RUN. Without a name: which there are.
    """
    from kvtrim.bench.analyses.base import OfFolders, OfPrompts
    from kvtrim.bench.analyses.registry import ANALYSES, find

    if name is None:
        _list(list(ANALYSES.values()), json)
        return
    analysis = find(name)
    options.require_folder(out)
    _require_packages(analysis)
    for option, use in _OPTIONS.items():
        if use not in analysis.uses:
            options.require_unset(context, (option,), f"changes nothing in {name}; leave it out")
    if isinstance(analysis, OfFolders):
        why = f"is for prompts, and {name} reads folders; leave it out"
        options.require_unset(context, (*_OF_PROMPTS, *_OF_MODELS), why)
        _finish(analysis, _of_folders(analysis, sources or []), {}, out, svg, json)
        return
    assert isinstance(analysis, OfPrompts)
    options.require_choice("--protocol", protocol, PROTOCOLS)
    _require_sources(analysis, sources or [], task or [], question)
    for what, given, use in (("--length", length, "lengths"), ("--rate", rate, "lengths")):
        if len(given or []) > 1 and use not in analysis.uses:
            raise UsageError(f"{what} is given several times, and {name} takes one")
    from kvtrim.bench.candidates import PLAIN, candidates
    from kvtrim.tasks import find_tasks
    from kvtrim.tasks.rows import reader

    keeps = tuple(keep or analysis.keeps)
    chosen = candidates([*(method or analysis.methods)], keeps, options.parse_settings(set_))
    cells = tuple(cell for cell in chosen if cell.method != PLAIN)
    tasks, rows = find_tasks(task or []), reader(data)
    for each in tasks:
        for file in each.data:
            rows(file)
    texts = {Path(file).name: options.read_text(file) for file in sources or []}
    loaded, tokenizer = options.load(model, device, dtype, threads, allow_untested)
    from kvtrim.bench.analyses import prompts
    from kvtrim.bench.analyses.base import Asked
    from kvtrim.bench.eval.evaluate import Subject

    subject, lengths = Subject(model, loaded, tokenizer), length or []
    if tasks:
        subjects = prompts.of_tasks(subject, tasks, rows, lengths, limit, seed)
    else:
        subjects = prompts.of_texts(subject, texts, question, lengths, chat)
    prompts.require_tokens(subjects, max(analysis.least, 2 * window))
    aware = protocol == AWARE or (protocol is None and bool(tasks or question))
    with output.progress() as report:
        asked = Asked(
            model,
            loaded,
            tokenizer,
            subjects,
            aware,
            cells,
            keeps,
            tuple(rate or Asked.rates),
            tuple(layer or ()),
            window,
            seed,
            report,
        )
        found = replace(analysis.compute(asked), subject=asked.about)
    _finish(analysis, found, _record(asked, AWARE if aware else AGNOSTIC), out, svg, json)


def _list(known: Sequence["Analysis"], json: bool) -> None:
    """Every analysis, the paper, what it reads, and the figure that it redraws."""
    from kvtrim.bench.analyses.base import OfFolders

    rows = []
    for one in known:
        reads = "eval folders" if isinstance(one, OfFolders) else "prompts"
        rows.append([one.name, one.paper, reads, one.figure])
    if json:
        names = [heading for heading, _ in _LISTED]
        output.print_json({"analyses": [dict(zip(names, row, strict=True)) for row in rows]})
        return
    output.table("kvtrim analyze NAME FILE, or --task T, or DIR", output.Cells(_LISTED, rows))


def _require_packages(analysis: "Analysis") -> None:
    for package in analysis.needs:
        if importlib.util.find_spec(package) is None:
            shown = {"sklearn": "scikit-learn"}.get(package, package)
            raise UsageError(f'{analysis.name} needs {shown}: pip install "kvtrim[analysis]"')


def _require_sources(
    analysis: "OfPrompts", sources: Sequence[str], tasks: Sequence[str], question: str | None
) -> None:
    """Either texts or tasks, and what goes with them."""
    if analysis.scores and not tasks:
        raise UsageError(
            f"{analysis.name} needs right answers: take the prompts of a benchmark with --task "
            "(ruler-vt makes its own)"
        )
    if bool(sources) == bool(tasks):
        what = "both a file and --task are given" if tasks else "there is no prompt"
        raise UsageError(f"{what}; name text files, or benchmarks with --task")
    if tasks and question is not None:
        raise UsageError("--question goes with a text file; benchmarks bring their own")


def _of_folders(analysis: "OfFolders", sources: Sequence[str]) -> "Finding":
    from kvtrim.report import results

    if not sources:
        raise UsageError(
            f"{analysis.name} reads folders that kvtrim eval wrote with --out; name some"
        )
    with output.busy("reading and averaging"):
        return analysis.compute(*results.read_results([Path(source) for source in sources]))


def _record(asked: Any, protocol: str) -> dict[str, Any]:
    """Everything that decides what the figures are."""
    from kvtrim.bench.provenance import provenance
    from kvtrim.hf.models import fingerprint

    return {
        "model": {"name": asked.name} | fingerprint.of_model(asked.model),
        "protocol": protocol,
        "prompts": [
            {"name": one.name, "tokens": one.tokens} | one.given.line(one.task.name)
            for one in asked.subjects
        ],
        "cells": [one.record() for one in asked.cells],
        "keeps": list(asked.keeps),
        "rates": list(asked.rates),
        "layers": list(asked.layers),
        "window": asked.window,
        "seed": asked.seed,
        "machine": provenance(asked.model.device),
    }


def _finish(
    analysis: "Analysis",
    found: "Finding",
    record: dict[str, Any],
    out: Path,
    svg: bool,
    json: bool,
) -> None:
    """Write table and picture; without matplotlib the table alone."""
    from kvtrim.report.plots import panels

    form = "svg" if svg else "png"
    whole = {"analysis": analysis.name, "paper": analysis.paper, "record": record} | found.json()
    _write(out / f"{analysis.name}.json", (library.dumps(whole, indent=1) + "\n").encode())
    _write(out / f"{analysis.name}.md", found.markdown().encode())
    picture: Path | None = out / f"{analysis.name}.{form}"
    try:
        _write(picture, panels.draw(found.heading, found.panels, found.across, form))
    except UsageError as error:
        output.note(f"{out / analysis.name}.json is written; no picture: {error}")
        picture = None
    files = {"json": str(out / f"{analysis.name}.json"), "md": str(out / f"{analysis.name}.md")}
    files["picture"] = "" if picture is None else str(picture)
    if json:
        output.print_json({"files": files} | whole)
        return
    output.table(found.title, found.cells, wide=True)
    output.lines([found.about, ", ".join(filter(None, files.values()))])


def _write(path: Path, content: bytes) -> None:
    from kvtrim import files

    files.make_folder(path.parent)
    files.replace(path, content)
