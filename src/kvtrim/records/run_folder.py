"""The files of an evaluation while it runs: what was asked, what came of it, how long it took.

Lines are written a unit of samples at a time. A unit that is not complete when a run goes on is
dropped and measured again, so that the files come out as if nothing had happened.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from kvtrim.errors import UsageError
from kvtrim.records import INPUTS, SAMPLES, TIMES, InputLine, Key, SampleLine, TimeLine
from kvtrim.records.journal import Journal, lock


class RunFolder:
    """The three journals of one run, gone through from the start, by one process at a time.

    Args:
        folder: of the run.
        wait: for another process that writes there.

    Raises:
        UsageError: another process writes there, unless it is waited for.
    """

    def __init__(self, folder: Path, wait: bool = False):
        self._folder = folder
        self._lock = ExitStack()
        self._lock.enter_context(lock(folder, wait))
        self._inputs, self._samples, self._times = (
            Journal(folder / name) for name in (INPUTS, SAMPLES, TIMES)
        )
        self._asked, self._measured = 0, 0  # inputs and lines of the units gone through
        self._ends = False  # what comes now is new

    @property
    def empty(self) -> bool:
        """Nothing was measured yet."""
        return not self._samples.lines

    def holds(self, inputs: Sequence[InputLine], keys: Sequence[Key]) -> bool:
        """Whether the next unit is there; if not, what there is of it is dropped.

        Args:
            inputs: of its samples, in order, as they are made now.
            keys: of its lines, in order.

        Raises:
            UsageError: other lines stand there, or the samples were made differently.
        """
        if self._ends:
            return False
        there = self._samples.lines[self._measured :]
        asked = self._inputs.lines[self._asked : self._asked + len(inputs)]
        times = self._times.lines[self._measured : self._measured + len(keys)]
        pairs = list(zip(keys, there, strict=False))
        if any(not key.items() <= line.items() for key, line in pairs):
            raise UsageError(
                f"{self._folder / SAMPLES} holds other samples than this run has, although it "
                "was asked for the same; name another folder with --out"
            )
        if len(there) < len(keys) or len(asked) < len(inputs) or len(times) < len(keys):
            self._ends = True
            self._inputs.cut(self._asked)
            self._samples.cut(self._measured)
            self._times.cut(self._measured)
            return False
        self._compare(inputs)
        self._asked, self._measured = self._asked + len(inputs), self._measured + len(keys)
        return True

    def _compare(self, inputs: Sequence[InputLine]) -> None:
        """A task that is not ours may have changed without another version number."""
        there = self._inputs.lines[self._asked : self._asked + len(inputs)]
        now = json.loads(json.dumps(inputs))
        if there == now:
            return
        pairs = list(zip(there, now, strict=False))
        one = next((one for old, one in pairs if old != one), now[-1])
        raise UsageError(
            f"sample {one['sample']} of task {one['task']} is not what {self._folder / INPUTS} "
            "holds: its prompt or its answers have changed since. Count up the version of the "
            "task and name another folder with --out, or go on with the task as it was"
        )

    def close(self) -> None:
        """Let others write."""
        self._lock.close()

    def add(
        self,
        inputs: Sequence[InputLine],
        samples: Sequence[SampleLine],
        times: Sequence[TimeLine],
    ) -> None:
        """Write down a unit."""
        self._inputs.extend(inputs)
        self._times.extend(times)
        self._samples.extend(samples)
