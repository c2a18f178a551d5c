"""The lines of a unit: what every method makes of its samples, in the order of the grid."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from time import perf_counter
from typing import Any, TypeVar

from kvtrim.bench.candidates import Candidate
from kvtrim.bench.eval.decode import (
    Answer,
    Branch,
    Fit,
    Reference,
    answers,
    fits,
    make_branch,
    merge,
)
from kvtrim.bench.eval.encode import Input
from kvtrim.bench.eval.grid import FULL, Grid
from kvtrim.bench.eval.prefill import Prefill, Ready
from kvtrim.bench.failures import Failure, attempt
from kvtrim.hf.batch import kind
from kvtrim.hf.generate import synchronize
from kvtrim.records import OK, REFUSED, Key, SampleLine, TimeLine, Times
from kvtrim.tasks.base import Task

Made = TypeVar("Made")


@dataclass
class Row:
    """One sample under one method and budget."""

    given: Input
    cell: Candidate
    held: dict[str, Any] = field(default_factory=dict)
    fit: Fit = field(default_factory=lambda: Fit(None, None))
    answer: Answer = field(default_factory=lambda: Answer("", 0, ""))
    times: Times = field(default_factory=Times)
    outcome: str = OK
    reason: str = ""

    def fail(self, why: Failure) -> None:
        """Nothing counts that was measured, and why."""
        self.outcome, self.reason = why.outcome, why.reason

    def line(self, key: Key) -> SampleLine:
        """What `samples.jsonl` says of it."""
        good = self.outcome == OK
        return {
            **key,
            "answer": self.answer.text if good else "",
            "new_tokens": self.answer.new_tokens if good else 0,
            "stopped": self.answer.stopped if good else "",
            "held_bytes": self.held["held_bytes"] if good else None,
            "full_bytes": self.held["full_bytes"] if good else None,
            "entries": self.held["entries"] if good else None,
            "prompt_tokens": len(self.given.ids),
            "loss": _finite(self.fit.loss) if good else None,
            "kl": _finite(self.fit.kl) if good and self.cell.method != FULL else None,
            "outcome": self.outcome,
            "reason": self.reason,
        }


def _finite(value: float | None) -> float | None:
    """A figure that JSON has; half precision may overflow."""
    return value if value is not None and isfinite(value) else None


@dataclass(frozen=True)
class Group:
    """Rows that go on in common passes."""

    rows: list[Row]
    branch: Branch


class Answering:
    """Makes the lines of units. The model must be attached."""

    def __init__(self, model: Any, tokenizer: Any, grid: Grid, once: bool):
        self._model, self._tokenizer, self._grid, self._once = model, tokenizer, grid, once

    def lines(self, task: Task, unit: Sequence[Input]) -> tuple[list[SampleLine], list[TimeLine]]:
        """The lines for `samples.jsonl`, and those for `times.jsonl`."""
        rows: list[Row] = []
        groups: list[Group] = []
        for given in unit:
            own = [Row(given, cell) for cell in self._grid.cells]
            rows += [row for row in own if row.cell in self._grid.written]
            groups += self._begin(own)
        for group in self._pack(groups):
            self._answer(task, group)
        keys = [self._grid.key(task, row.given.sample, row.cell) for row in rows]
        told = [row.line(key) for key, row in zip(keys, rows, strict=True)]
        return told, [{**key, **row.times} for key, row in zip(keys, rows, strict=True)]

    def _begin(self, rows: list[Row]) -> list[Group]:
        """Read a prompt under every method, and ask how likely the right answer is to each."""
        given, reference = rows[0].given, Reference()
        if given.problem:
            for row in rows:
                row.fail(Failure(REFUSED, given.problem))
            return []
        how = self._grid.aware, self._once, self._grid.prefill_chunk
        prefill = Prefill(self._model, self._tokenizer, given, *how)
        by_cell, ready = {(row.cell.label, row.cell.keep): row for row in rows}, []
        for cell, one in zip(self._grid.cells, prefill.ready(self._grid.cells), strict=True):
            row = by_cell[cell.label, cell.keep]
            if isinstance(one, Failure):
                row.fail(one)
            else:
                row.held, row.times = one.held, one.times.copy()
                ready.append((row, one))
        del prefill
        groups = []
        for some in self._bundles(ready):
            groups += self._branch(some)
        for group in groups:
            self._fit(group, reference)
        return [group for group in groups if group.rows[0].cell in self._grid.written]

    def _bundles(self, ready: list[tuple[Row, Ready]]) -> list[list[tuple[Row, Ready]]]:
        """Those that can go on together, at most `batch` of them; the others one by one."""
        found: dict[Any, list[tuple[Row, Ready]]] = {}
        for number, (row, one) in enumerate(ready):
            alone = self._grid.batch == 1 or row.cell not in self._grid.written
            same = None if alone else kind(one.cache)
            found.setdefault(number if same is None else same, []).append((row, one))
        size = self._grid.batch
        return [
            some[at : at + size] for some in found.values() for at in range(0, len(some), size)
        ]

    def _branch(self, some: list[tuple[Row, Ready]]) -> list[Group]:
        """One group, or one for each where memory does not do for all."""
        rows, given = [row for row, _ in some], some[0][0].given
        _, _, lead = given.read_first(self._grid.aware)
        caches, logits = [one.cache for _, one in some], [one.logits for _, one in some]
        made = attempt(lambda: make_branch(self._model, caches, logits, lead, len(given.ids)))
        if isinstance(made, Branch):
            return [Group(rows, made)]
        if len(some) > 1:
            return [group for one in some for group in self._branch([one])]
        rows[0].fail(made)
        return []

    def _fit(self, group: Group, reference: Reference) -> None:
        skip = 1 if self._grid.aware else 0
        group.branch.full = group.rows[0].cell.method == FULL
        gold = group.rows[0].given.gold
        found = each(group.branch, lambda part: fits(self._model, part, gold, skip, reference))
        for row, fit in zip(group.rows, found, strict=True):
            if isinstance(fit, Failure):
                row.fail(fit)
            else:
                row.fit = fit

    def _pack(self, groups: list[Group]) -> list[Group]:
        """Groups of several samples put together as far as `batch` goes."""
        packed: list[list[Group]] = []
        for group in groups:
            room = next((some for some in packed if self._fits_with(some, group)), None)
            if room is None:
                packed.append([group])
            else:
                room.append(group)
        found: list[Group] = []
        for some in packed:
            made = attempt(lambda some=some: merge([group.branch for group in some]))
            if isinstance(made, Failure):
                found += some
            else:
                found.append(Group([row for group in some for row in group.rows], made))
        return found

    def _fits_with(self, some: list[Group], group: Group) -> bool:
        rows = sum(len(one.rows) for one in some) + len(group.rows)
        same = kind(group.branch.cache)
        return rows <= self._grid.batch and same is not None and same == kind(some[0].branch.cache)

    def _answer(self, task: Task, group: Group) -> None:
        """Let every row answer for itself."""
        start = self._now()
        most, stop = self._grid.answer_tokens(task), [text for text in task.stop if text]
        found = each(
            group.branch,
            lambda part: answers(
                self._model, self._tokenizer, part, most, stop, task.min_new_tokens
            ),
        )
        seconds = (self._now() - start) / len(group.rows)
        for row, answer in zip(group.rows, found, strict=True):
            row.times["decode_s"] = seconds
            if isinstance(answer, Failure):
                row.fail(answer)
            else:
                row.answer = answer

    def _now(self) -> float:
        synchronize(self._model.device)
        return perf_counter()


def each(branch: Branch, what: Callable[[Branch], list[Made]]) -> list[Made | Failure]:
    """Something about every row, or about one after the other where memory does not do for all."""
    if branch.rows == 1:
        found = attempt(lambda: what(branch))
        return [found] if isinstance(found, Failure) else [*found]
    mark = branch.cache.mark()
    found = attempt(lambda: what(branch))
    if not isinstance(found, Failure):
        return [*found]
    results: list[Any] = []
    for row in range(branch.rows):
        branch.cache.rewind(mark)
        results += each(branch.row(row), what)
    branch.cache.rewind(mark)
    return results
