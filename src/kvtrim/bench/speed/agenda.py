"""Measurements in order of value within a time that is given: what fits is done, the rest is said.

One process measures, another watches it. Every measurement has an estimate, corrected by how long
those of its stage really took, and none is begun that no longer fits. Each result is one line of a
journal, written at once; a failure is a result too. A measurement that hangs is ended by the
watcher, one that takes the process with it is noticed, and both times a new process goes on behind
it. The same makes a second run on the same folder go on where the first one ended.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

from kvtrim.records import (
    BEGUN,
    ENDED,
    FAILED,
    OK,
    SKIPPED,
    UNFINISHED,
    AgendaFigures,
    AgendaLine,
)
from kvtrim.records.journal import Journal

LINES = "gpu.jsonl"

_LONGEST = 4.0  # times its estimate that a measurement may take before it counts as hanging
_SETUP = 90.0  # seconds that it may take more, to make the model in a new process
_GRACE = 15.0  # seconds that the measuring process may run over its time
_STARTS = 6  # processes at most
_POLL = 0.2
_CLEAN, _BROKEN = 0, 3  # exit codes of a measuring process: nothing is left; start another one


@dataclass(frozen=True)
class Item:
    """One measurement."""

    stage: str
    name: str
    estimate_s: float
    work: Callable[[], dict[str, Any]]  # raises where there is no figure
    skip: str = ""  # why it is not even tried, if it is not

    @property
    def key(self) -> dict[str, str]:
        """What tells its lines from others."""
        return {"stage": self.stage, "name": self.name}


class Unfinished(Exception):
    """A measurement of several parts ran out of time; a further run goes on with it."""


class Agenda:
    """The measurements of one run, and the journal of what has become of them.

    Args:
        about: goes into every line: machine, versions, commit. Lines of another device, and
            failures of other code, do not count as done.
    """

    def __init__(self, items: Sequence[Item], folder: Path, about: dict[str, Any]):
        self.items, self.about = items, about
        self.journal = Journal(folder / LINES)

    def run(
        self,
        until: float,
        broken: Callable[[], bool] = lambda: False,
        setup: Callable[[], float] = lambda: 0.0,
        tell: Callable[[str], None] = lambda _: None,
        now: Callable[[], float] = time.time,
    ) -> int:
        """Measure what is not done yet and still fits.

        Args:
            until: when it has to be over, in seconds of `now`.
            broken: whether this process cannot measure any more, asked after each failure.
            setup: seconds that went into preparations so far; they belong to no measurement.
            tell: is told what became of each.

        Returns:
            The exit code of the process.
        """
        self._close_open()
        left = []
        for item in self.items:
            if self._is_done(item):
                continue
            if item.skip:
                self._add(item, SKIPPED, {"reason": item.skip})
                continue
            expected = self.estimate(item)
            if now() + expected > until:
                left.append(f"{item.stage}: {item.name}")
                continue
            limit = min(_LONGEST * expected + _SETUP, max(1.0, until - now()) + _GRACE)
            self._add(item, BEGUN, {"limit_s": limit, "at": now()})
            begin, before = now(), setup()
            outcome, found = attempt(item)
            seconds = now() - begin - (setup() - before)
            took: AgendaFigures = {"seconds": seconds, "estimate_s": item.estimate_s}
            self._add(item, outcome, {**took, **found})
            tell(
                f"{item.stage}: {item.name}: {outcome}, {seconds:.1f} s {found.get('reason', '')}"
            )
            if outcome == FAILED and broken():
                return _BROKEN
        if left:
            tell(f"{len(left)} were left to a further run: {'; '.join(left)}")
        return _CLEAN

    def estimate(self, item: Item) -> float:
        """Its estimate, corrected by what others of its stage took, or else by all others."""
        took = [
            (line["stage"], line["seconds"] / line["estimate_s"])
            for line in self._own_lines()
            if line["outcome"] == OK and "seconds" in line and "estimate_s" in line
        ]
        same = [factor for stage, factor in took if stage == item.stage]
        factors = same or [factor for _, factor in took]
        return item.estimate_s * (median(factors) if factors else 1.0)

    def _own_lines(self) -> list[AgendaLine]:
        device, lines = self.about.get("device"), cast(list[AgendaLine], self.journal.lines)
        return [line for line in lines if line["machine"].get("device") == device]

    def _is_done(self, item: Item) -> bool:
        lines = [x for x in self._own_lines() if item.key.items() <= x.items()]
        code = self.about.get("code")
        same = [
            x
            for x in lines
            if x["machine"].get("code") == code and x["outcome"] not in (BEGUN, UNFINISHED)
        ]
        return bool(same) or any(x["outcome"] == OK for x in lines)

    def _close_open(self) -> None:
        """What was begun and has no end took its process with it."""
        for begun in open_lines(self.journal.lines):
            reason = "the process ended or hung during it"
            self.journal.add({**begun, "outcome": ENDED, "reason": reason})

    def _add(self, item: Item, outcome: str, found: AgendaFigures) -> None:
        line: AgendaLine = {
            "stage": item.stage,
            "name": item.name,
            "outcome": outcome,
            **found,
            "machine": self.about,
        }
        self.journal.add(line)


def attempt(item: Item) -> tuple[str, AgendaFigures]:
    """What a measurement gave, or its error on one line."""
    try:
        return OK, {"figures": item.work()}
    except Unfinished as error:
        return UNFINISHED, {"reason": str(error)}
    except Exception as error:
        text = " ".join(str(error).split())
        return FAILED, {"reason": f"{type(error).__name__}: {text[:600]}"}


def open_lines(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of measurements that were begun and have no other line after that."""
    open_: dict[tuple[str, str], dict[str, Any]] = {}
    for line in lines:
        key = line["stage"], line["name"]
        if line["outcome"] == BEGUN:
            open_[key] = line
        else:
            open_.pop(key, None)
    return list(open_.values())


def watch(command: Sequence[str], folder: Path, until: float, env: dict[str, str]) -> None:
    """Run the measuring process, and again where it ends or hangs in the middle.

    Args:
        command: runs `Agenda.run` on the folder and exits with what that returns.
        until: when it has to be over, in seconds since the epoch.
    """
    for _ in range(_STARTS):
        before = len(Journal(folder / LINES).lines)
        process = subprocess.Popen(list(command), env={**os.environ, **env})
        code = _follow(process, folder, until)
        after = Journal(folder / LINES).lines
        if code == _CLEAN or time.time() > until or len(after) == before:
            return
        said = f"the measuring process ended with {code}; going on behind it"
        print(said, file=sys.stderr, flush=True)  # noqa: T201


def _follow(process: subprocess.Popen[bytes], folder: Path, until: float) -> int | None:
    """The exit code of the measuring process; None if it hung and was ended."""
    path, size, deadline = folder / LINES, -1, until + _GRACE
    started = time.time()
    while process.poll() is None:
        time.sleep(_POLL)
        grown = path.stat().st_size if path.exists() else 0
        if grown != size:
            size, deadline = grown, until + _GRACE
            own = [x for x in open_lines(_lines(path)) if x["at"] >= started]
            deadline = min([deadline, *(begun["at"] + begun["limit_s"] for begun in own)])
        if time.time() > deadline:
            process.kill()
            process.wait()
            return None
    return process.returncode


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal that another process is writing."""
    data = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
