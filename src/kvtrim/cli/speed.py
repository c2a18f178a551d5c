"""`speed`: seconds and bytes beside plain transformers, measured in this run."""

import json as library
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtrim.cli import options, output
from kvtrim.errors import UsageError

if TYPE_CHECKING:
    from kvtrim.bench.candidates import Candidate
    from kvtrim.bench.speed.clock import Plan
    from kvtrim.bench.speed.max_batch import Search
    from kvtrim.records.journal import Journal

MODEL = "smollm2"
PEERS = ("kvpress",)
LARGEST = "max"  # of --batch

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help=f"As in `ask`. Default: {MODEL}."),
]
Config = Annotated[
    str | None,
    typer.Option(
        "--config",
        help="A model of published dimensions with random weights instead of --model: "
        "llama-3.1-8b, llama-3.2-1b, llama-3.2-3b, ministral-8b, mistral-nemo-12b, phi-3.5-mini, "
        "qwen3-8b or smollm2-135m.",
    ),
]
Layers = Annotated[
    int | None, typer.Option(min=1, help="With --config: decoder layers. Default: all.")
]
Width = Annotated[
    str | None,
    typer.Option(
        help="With --config: KV heads per layer (2) or their share (0.25, 25%). Query heads, "
        "hidden and MLP size shrink alike; head size, RoPE and vocabulary stay. Default: all."
    ),
]
Lengths = Annotated[
    list[int] | None,
    typer.Option("--length", "--context", min=1, help="Prompt length; repeat for several."),
]
Batches = Annotated[
    list[str] | None,
    typer.Option(
        "--batch",
        help="Prompts at once; repeat for several. Default: 1. `max` searches for the largest "
        "batch that decodes within --memory, prompts being read one after the other.",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(help="With --batch max: bytes for weights, caches and work (40GiB)."),
]
Capture = Annotated[
    bool,
    typer.Option(
        "--capture/--no-capture",
        help="Capture decoding steps as CUDA graphs where a method allows it. No effect on CPUs.",
    ),
]
Repeats = Annotated[
    int, typer.Option(min=1, help="Counted rounds; warm-up and a round for memory come before.")
]
Steps = Annotated[
    int, typer.Option("--new-tokens", min=1, help="Decoding steps after each prompt.")
]
Peers = Annotated[
    list[str] | None,
    typer.Option("--peer", help="Measure another library in the same run: kvpress."),
]
OutFolder = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help="A folder for run.json, speed.jsonl, speed.json, speed.md and plots. A run that was "
        "cut off goes on where it stopped when asked for again.",
    ),
]


def speed(
    length: Lengths = None,
    method: options.Methods = None,
    keep: options.Keeps = None,
    batch: Batches = None,
    memory: Memory = None,
    set_: options.Set = None,
    new_tokens: Steps = 32,
    repeats: Repeats = 3,
    prefill_chunk: options.Chunk = None,
    capture: Capture = True,
    peer: Peers = None,
    out: OutFolder = None,
    model: Model = None,
    config: Config = None,
    layers: Layers = None,
    width: Width = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    allow_untested: options.AllowUntested = False,
    json: options.Json = False,
) -> None:
    """Measure first token, time per token, end to end and memory, by length, method, keep, batch.

    Plain transformers is always measured in the same run, and ratios are to it. With --config no
    weights are needed. FastKV's published times are put beside as ratios to its full cache.
    """
    from kvtrim.bench.speed.clock import Plan

    lengths, most = (
        tuple(length or [512, 2048]),
        _memory(batch, memory, peer, prefill_chunk),
    )
    if most is None:
        batches = _batches(batch)
        plan: Any = Plan(lengths, batches, new_tokens, repeats, prefill_chunk, capture)
    else:
        plan = _search(lengths, most, new_tokens, capture)
    chosen = _candidates(method, keep, set_, peer or [])
    if out is not None:
        options.require_folder(out)
    about = {"name": _name(model, config, layers, width), "config": config}
    loaded = _model(model, config, layers, width, device, dtype, threads, allow_untested)
    plan.require_fits(loaded, trained=config is None)
    record = _record(loaded, about, plan, chosen)
    with _open(out, record) as (journal, record):
        if most is not None:
            _fill(loaded, plan, chosen, journal, record, out, json)
            return
        _measure(loaded, plan, chosen, journal)
        _finish(out, record, journal.lines, json)


def _candidates(
    methods: list[str] | None, keeps: list[str] | None, set_: list[str] | None, peers: list[str]
) -> "list[Candidate]":
    from kvtrim.bench.candidates import candidates
    from kvtrim.bench.speed import peer_kvpress

    methods, keeps = methods or ["full", "snapkv", "adakv"], keeps or ["512"]
    chosen = candidates(methods, keeps, options.parse_settings(set_))
    for name in dict.fromkeys(peers):
        options.require_choice("--peer", name, PEERS)
        peer_kvpress.require()
        chosen += peer_kvpress.candidates(methods, keeps)
    return chosen


def _name(model: str | None, config: str | None, layers: int | None, width: str | None) -> str:
    """The model in words."""
    if config is None:
        return model or MODEL
    cut = [f"{layers} layers"] if layers is not None else []
    cut += [f"width {width}"] if width is not None else []
    return f"{config} ({', '.join(['random weights', *cut])})"


def _model(
    model: str | None,
    config: str | None,
    layers: int | None,
    width: str | None,
    device: str | None,
    dtype: str | None,
    threads: int | None,
    allow_untested: bool,
) -> Any:
    """The model asked for: loaded, or made with random weights."""
    if config is None:
        if layers is not None or width is not None:
            raise UsageError("--layers and --width need --config: a loaded model stays as it is")
        return options.load(model or MODEL, device, dtype, threads, allow_untested)[0]
    if model is not None:
        raise UsageError("give --model or --config, not both")
    share = None if width is None else _width(width)
    with output.busy(f"making {config}"):
        import torch

        from kvtrim.hf.models.random import build

        if threads is not None:
            torch.set_num_threads(threads)
        return build(config, layers=layers, width=share, device=device, dtype=dtype)


def _width(text: str) -> int | float:
    """A number of KV heads (2), or a share of them (0.25, 25%)."""
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return float(text) if "." in text else int(text)
    except ValueError:
        raise UsageError(f"--width {text}: give KV heads (2) or a share (0.25 or 25%)") from None


def _record(model: Any, about: dict[str, Any], plan: Any, chosen: Any) -> dict[str, Any]:
    """Everything that decides what the figures mean."""
    from dataclasses import asdict

    from kvtrim.bench.provenance import outside, provenance
    from kvtrim.bench.speed import roofline
    from kvtrim.hf.models import fingerprint

    own = fingerprint.of_model(model) | {"identity": fingerprint.identity(model)}
    return {
        "model": about | {"dtype": own["dtype"]} | own,
        "plan": asdict(plan),
        "candidates": [candidate.record() for candidate in chosen],
        "outside": outside({candidate.method for candidate in chosen if not candidate.peer}),
        "machine": provenance(model.device),
        "limits": roofline.of_model(model) | roofline.of_machine(model.device, model.dtype),
    }


def _open(
    out: Path | None, record: dict[str, Any]
) -> AbstractContextManager["tuple[Journal, dict[str, Any]]"]:
    """The journal and the record of the run; its folder is nobody else's until it is closed."""
    from kvtrim.records import journal

    if out is None:
        return nullcontext((journal.Journal(), record))
    return journal.open_run(out, record)


def _measure(model: Any, plan: "Plan", chosen: "list[Candidate]", journal: "Journal") -> None:
    from kvtrim.bench.speed.clock import measure, turns

    total, left = len(list(turns(plan, chosen))) + 1, len(journal.lines)
    with output.progress() as report:

        def tell(what: str) -> None:
            nonlocal left
            left += 1
            report(what, left, total)

        measure(model, plan, chosen, journal, tell)


def _finish(
    out: Path | None, record: dict[str, Any], lines: list[dict[str, Any]], json: bool
) -> None:
    """Files, and the tables or the record."""
    from kvtrim.report import published
    from kvtrim.report import speed as tables

    rows = tables.rows(lines, record["limits"])
    if out is not None:
        section = published.section(record["model"], rows)
        _write(out, record, rows, tables.page(record, rows, section), tables.title(record))
    if json:
        output.print_json(record | {"rows": rows})
    else:
        output.table(tables.title(record), tables.table(rows, short=True), wide=True)
        for line in tables.reasons(rows):
            output.out.print(f"not measured: {line}", markup=False, highlight=False)
        beside = published.cells(record["model"], rows, only_measured=True)
        if beside.rows:
            name = "FastKV's published times as ratios to its full cache, ours to transformers"
            output.table(f"{name} (arXiv 2502.01068)", beside)


def _write(
    out: Path, record: dict[str, Any], rows: list[dict[str, Any]], page: str, title: str
) -> None:
    """The files that are made from the journal."""
    from kvtrim.files import replace
    from kvtrim.report.plots import speed as plots

    replace(out / "speed.json", (library.dumps(record | {"rows": rows}, indent=1) + "\n").encode())
    replace(out / "speed.md", page.encode())
    try:
        plots.speed(rows, out, title.partition(";")[0])
    except UsageError as error:
        output.err.print(f"kvtrim: {error}; everything else is in {out}", markup=False)


def _memory(
    batch: list[str] | None, memory: str | None, peer: list[str] | None, chunk: int | None
) -> int | None:
    """Bytes to fill, if the largest batch is asked for.

    Raises:
        UsageError: one of --batch max and --memory without the other, or what it cannot do.
    """
    if batch != [LARGEST]:
        if memory is not None or LARGEST in (batch or []):
            raise UsageError("--batch max and --memory SIZE go together, without another --batch")
        return None
    if memory is None:
        raise UsageError("--batch max needs to know what to fill: --memory 40GiB")
    if peer or chunk is not None:
        raise UsageError(
            "--batch max reads whole prompts of its own; drop --peer, --prefill-chunk"
        )
    return options.parse_size(memory, f"--memory {memory}: give a size, as 40GiB or 512MiB")


def _batches(batch: list[str] | None) -> tuple[int, ...]:
    """Numbers of prompts at once. Raises UsageError if one is none."""
    for each in batch or []:
        if not each.isdecimal() or int(each) < 1:
            raise UsageError(f"--batch {each}: give a number from 1 on, or {LARGEST}")
    return tuple(int(each) for each in batch or ["1"])


def _search(lengths: tuple[int, ...], memory: int, new_tokens: int, capture: bool) -> "Search":
    """What to search for."""
    from kvtrim.bench.speed.max_batch import Search

    return Search(lengths, memory, new_tokens, capture=capture)


def _fill(
    model: Any,
    plan: "Search",
    chosen: "list[Candidate]",
    journal: "Journal",
    record: dict[str, Any],
    out: Path | None,
    json: bool,
) -> None:
    """Search for the largest batches, write the files, print the table or the record."""
    from kvtrim.bench.speed.max_batch import search
    from kvtrim.files import replace
    from kvtrim.report import max_batch as report

    with output.busy("searching") as say:
        search(model, plan, chosen, journal, lambda what: say(f"trying {what}"))
    rows = report.rows(journal.lines)
    if out is not None:
        replace(out / "largest.md", report.page(record, rows).encode())
    if json:
        output.print_json(record | {"rows": rows})
        return
    output.table(report.title(record), report.table(rows), wide=True)
