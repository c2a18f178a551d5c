"""An evaluation: every sample of every task under every method and budget, and what came of it.

One unit of samples at a time: each prompt is read once (`prefill`), every method's cache is
asked how likely the right answer is, and then answers for itself (`decode`). The lines go to the
run's journals unit by unit (`run_folder`); scores and tables are made from them by `scores`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

from kvtrim import files, records
from kvtrim.bench.eval import extension
from kvtrim.bench.eval.encode import Encoder
from kvtrim.bench.eval.grid import Grid
from kvtrim.bench.eval.runner import Answering
from kvtrim.bench.provenance import provenance
from kvtrim.errors import FileError, UsageError
from kvtrim.hf.attach import attach
from kvtrim.hf.models import fingerprint
from kvtrim.hf.models.architectures import window
from kvtrim.records import RECORD, SAMPLES, journal
from kvtrim.records.run_folder import RunFolder
from kvtrim.tasks.base import Request, Sample, Task

Progress = Callable[[str, int, int], None]
"""Told what is going on, how much of it is done, and out of how much."""


class Rows(Protocol):
    """The rows of data by name; see `kvtrim.tasks.rows`."""

    def __call__(self, name: str) -> list[dict[str, Any]]:
        """All of them."""
        ...

    def fingerprint(self, name: str) -> dict[str, Any]:
        """Where they came from, how many they are, and their hash."""
        ...


@dataclass(frozen=True)
class Subject:
    """What is evaluated."""

    name: str
    model: Any
    tokenizer: Any

    def encoder(self, length: int | None, truncate_at: int | None = None) -> Encoder:
        """What makes its token ids: arguments as of `Encoder`.

        Raises:
            UsageError: the length is more than the model has positions for.
        """
        most = window(self.model)
        if length is not None and length > most:
            raise UsageError(
                f"--length {length} is more than the window of {self.name}, {most} tokens; ask "
                f"for {most} or less, or use a model with a longer window"
            )
        return Encoder(self.tokenizer, most, length, truncate_at)


def read(grid: Grid, rows: Rows) -> None:
    """Read the data of all tasks, so that what is not there is known before a model is loaded.

    Raises:
        UsageError: the data of a task is not there; says how to get it.
    """
    for task in grid.tasks:
        for name in task.data:
            rows(name)


Unit = tuple[Task, tuple[Sample, ...]]


def units(subject: Subject, grid: Grid, rows: Rows) -> list[Unit]:
    """Everything that is measured, in order.

    Raises:
        UsageError: the data of a task is not there.
    """
    encoder = subject.encoder(grid.length, grid.truncate_at)
    found: list[Unit] = []
    for task in grid.tasks:
        request = encoder.request(rows, grid.limit, grid.seed, task.chat)
        samples = distinct(islice(_samples(task, request, encoder, grid.fitting), grid.limit))
        found += [(task, unit) for unit in grid.units(encoder, samples)]
    return found


def distinct(samples: Iterable[Sample]) -> list[Sample]:
    """Samples with ids of their own: rows that share one are told apart by a number behind it."""
    found: dict[str, Sample] = {}
    for sample in samples:
        own, number = str(sample.id), 1
        while own in found:
            number += 1
            own = f"{sample.id}#{number}"
        found[own] = replace(sample, id=own)
    return list(found.values())


def _samples(task: Task, request: Request, encoder: Encoder, fitting: bool) -> Iterator[Sample]:
    """The samples of a task; with `fitting`, as many as asked for of those that fit."""
    found = iter(task.samples(request))
    first = next(found, None)
    if first is None:
        return
    if fitting and "length" not in first.group:  # which are made to fit, for this many samples
        found = iter(task.samples(replace(request, limit=None)))
    else:
        found = chain([first], found)
    yield from (one for one in found if not fitting or encoder.fits(task, one))


def record(subject: Subject, grid: Grid, rows: Rows) -> dict[str, Any]:
    """What `run.json` says: all that decides what the figures are, and where they were made."""
    own = fingerprint.of_model(subject.model)
    own |= {"identity": fingerprint.identity(subject.model)}
    own |= {"tokenizer": fingerprint.of_tokenizer(subject.tokenizer)}
    asked = grid.record()
    for task in grid.tasks:
        asked["tasks"][task.name]["data"] = {name: rows.fingerprint(name) for name in task.data}
    machine = provenance(subject.model.device)
    return {"kind": "eval", "model": {"name": subject.name} | own, **asked, "machine": machine}


def evaluate(
    subject: Subject,
    grid: Grid,
    rows: Rows,
    folder: Path,
    once: bool = True,
    progress: Progress = lambda *_: None,
) -> None:
    """Measure what a folder does not hold yet. `scores.derive` makes scores and tables of it.

    A folder that holds a run of some of these methods and budgets, and of nothing else, takes the
    others: see `extension`.

    Args:
        rows: the data, see `kvtrim.tasks.rows.reader`.
        folder: of this run; made if it is not there.
        once: read a prompt once for all methods that leave the pass over it as it is; else once
            for each, which gives the same.

    Raises:
        UsageError: the folder holds another run, the data of a task is not there, or prompts are
            to be longer than the model's window.
    """
    subject.encoder(grid.length)
    progress("reading the tasks", 0, 1)
    first = _grid_of(grid, folder)
    journal.begin(folder, record(subject, first, rows), SAMPLES)
    measure(subject, first, units(subject, first, rows), folder, once, progress)
    if first != grid:
        _extend(subject, grid, first, rows, folder, once, progress)


def _grid_of(grid: Grid, folder: Path) -> Grid:
    """The part of a grid that a folder holds, or the whole of it."""
    if not (folder / RECORD).exists():
        return grid
    extension.settle(folder)
    try:
        return extension.base(grid, records.record(folder / RECORD))
    except FileError:  # damaged: `opened` says so, if anything was measured
        return grid


def _extend(
    subject: Subject,
    grid: Grid,
    base: Grid,
    rows: Rows,
    folder: Path,
    once: bool,
    progress: Progress,
) -> None:
    """Measure the cells that a finished run lacks, and make one run of both."""
    new = extension.difference(grid, base)
    part = extension.part(folder, new)
    files.make_folder(part.parent)
    journal.begin(part, record(subject, new, rows), SAMPLES)
    measure(subject, new, units(subject, new, rows), part, once, progress)
    encoder = subject.encoder(grid.length, grid.truncate_at)
    ordered = units(subject, grid, rows)
    both = [(task, sample) for task, samples in ordered for sample in samples]
    with journal.lock(folder):
        there = records.record(folder / RECORD)
        extension.join(
            folder,
            part,
            there | {name: grid.record()[name] for name in ("methods", "outside")},
            [encoder.encode(task, sample).line(task.name) for task, sample in both],
            [grid.key(task, sample, cell) for task, sample in both for cell in grid.cells],
        )


def measure(
    subject: Subject,
    grid: Grid,
    chosen: Sequence[Unit],
    folder: Path,
    once: bool = True,
    progress: Progress = lambda *_: None,
    wait: bool = False,
) -> None:
    """Go through these units and write down those that the folder does not hold yet.

    Raises:
        UsageError: another process does so, unless it is waited for; or other units lie there.
    """
    book, done = RunFolder(folder, wait), 0
    answering = Answering(subject.model, subject.tokenizer, grid, once)
    encoder = subject.encoder(grid.length, grid.truncate_at)
    total = sum(len(samples) for _, samples in chosen)
    with attach(subject.model), closing(book):
        for task, samples in chosen:
            keys = [grid.key(task, sample, cell) for sample in samples for cell in grid.written]
            progress(f"{task.name} {samples[0].id}", done, total)
            given = [encoder.encode(task, sample) for sample in samples]
            inputs = [one.line(task.name) for one in given]
            if not book.holds(inputs, keys):
                book.add(inputs, *answering.lines(task, given))
            done += len(samples)
    progress("done", done, total)
