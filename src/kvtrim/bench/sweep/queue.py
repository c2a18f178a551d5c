"""The driver of a sweep: gives pieces of work to workers, again if one dies, and joins the parts.

What workers write is resumable and does not depend on who does what, so that a sweep comes out
as serial runs would, and can itself be killed and gone on with.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from kvtrim.bench.eval import scores
from kvtrim.bench.eval.evaluate import read
from kvtrim.bench.provenance import provenance
from kvtrim.bench.sweep.spec import Job, Piece, Sweep, pieces
from kvtrim.errors import KvtrimError
from kvtrim.files import replacement
from kvtrim.records import INPUTS, SAMPLES, TIMES, journal
from kvtrim.tasks.rows import reader

SWEEP = "sweep.json"
PARTS = "parts"


class Pool(Protocol):
    """Workers of one kind, each doing one piece at a time."""

    size: int

    def start(self) -> Any:
        """A new worker."""
        ...

    def give(self, worker: Any, piece: Piece) -> None:
        """Let an idle worker do a piece."""
        ...

    def wait(self) -> tuple[Any, dict[str, Any] | None]:
        """The next worker to be done, and what it made; None if it died."""
        ...

    def close(self) -> None:
        """End all workers."""
        ...


@dataclass
class Driver:
    """One run of a sweep."""

    sweep: Sweep
    folder: Path
    pool: Pool
    allow_code_execution: bool = False
    unconfined: bool = False
    progress: Callable[[str, int, int], None] = lambda *_: None

    def run(self) -> list[Path]:
        """Measure what is not there yet; the workers are ended, whatever comes of it.

        Returns:
            The folder of every job.

        Raises:
            UsageError: the folder holds another sweep, or data are not there.
            KvtrimError: a piece was refused, or its workers died again and again.
        """
        self._done = self._total = 0
        folders = {job: self.folder / job.name for job in self.sweep.jobs()}
        self._left: dict[Job, int] = {}
        self._parts: dict[Job, list[Path]] = {}
        self._busy: dict[Any, Piece] = {}
        try:
            self._begin()
            self._queue = [
                Piece(job, str(at)) for job, at in folders.items() if not _is_merged(at)
            ]
            if self._queue:
                first = self._queue[0].job  # all read the same
                read(first.grid(), reader(first.data))
                self._work()
        finally:
            self.pool.close()
        for job, at in folders.items():
            self._finish(job, at)
        return list(folders.values())

    def _begin(self) -> None:
        record = {"kind": "sweep", **self.sweep.record()}
        record["machine"] = provenance(torch.device("cpu"))
        journal.begin(self.folder, record, SAMPLES, SWEEP)

    def _work(self) -> None:
        idle: list[tuple[Any, str]] = []  # workers, and the models that they have loaded
        started = 0
        while self._queue or self._busy:
            while self._queue and (idle or started < self.pool.size):
                if not idle:
                    idle.append((self.pool.start(), ""))
                    started += 1
                worker, model = idle.pop()
                piece = self._take(model)
                self._busy[worker] = piece
                self.pool.give(worker, piece)
            worker, result = self.pool.wait()
            piece = self._busy.pop(worker, None)
            if piece is None:  # it died with nothing to do
                idle = [one for one in idle if one[0] is not worker]
                started -= 1
            elif result is None:
                started -= 1
                self._again(piece)
            else:
                self._settle(piece, result)
                idle.append((worker, piece.job.model))

    def _take(self, model: str) -> Piece:
        """The next piece, of the model that the worker has if there is one."""
        same = [piece for piece in self._queue if piece.job.model == model]
        piece = (same or self._queue)[0]
        self._queue.remove(piece)
        return piece

    def _again(self, piece: Piece) -> None:
        if piece.tried >= self.sweep.retries:
            raise KvtrimError(
                f"workers died {piece.tried + 1} times at {piece} (killed, or out of memory). "
                "Ask again to go on; fewer workers or a smaller batch need less memory"
            )
        self._queue.insert(0, replace(piece, tried=piece.tried + 1))

    def _settle(self, piece: Piece, result: dict[str, Any]) -> None:
        if "error" in result:
            raise KvtrimError(result["error"])
        job = piece.job
        if not piece.stop:
            journal.begin(Path(piece.folder), result["record"], SAMPLES)
            cut = pieces(job, piece.folder, result["units"], self.sweep.chunk)
            self._queue += cut
            self._left[job], self._parts[job] = len(cut), [Path(one.folder) for one in cut]
            self._total += sum(one.samples for one in cut)
        else:
            self._left[job] -= 1
            self._done += piece.samples
        self.progress(str(piece), self._done, max(1, self._total))
        if not self._left[job]:
            self._finish(job, self.folder / job.name)

    def _finish(self, job: Job, folder: Path) -> None:
        """Join a job's parts, which are all there; make scores and tables."""
        if not _is_merged(folder):
            merge(folder, self._parts[job])
        if not (folder / scores.PAGE).exists() or self.allow_code_execution:
            allowed = self.allow_code_execution, self.unconfined
            scores.derive(folder, job.grid().tasks, *allowed)
        shutil.rmtree(folder / PARTS, ignore_errors=True)


def _is_merged(folder: Path) -> bool:
    """The samples of a job are all there: they are put into place last, whole."""
    return (folder / SAMPLES).exists()


def merge(folder: Path, parts: Sequence[Path]) -> None:
    """Put the parts of a job behind each other, in the order of a serial run.

    Args:
        folder: of the job; parts that lie there of work cut up in another way do not count.
        parts: all of them, in order; none where the tasks have no samples.
    """
    for name in (INPUTS, TIMES, SAMPLES):
        with replacement(folder / name) as partial, partial.open("wb") as file:
            for part in parts:
                file.write((part / name).read_bytes())
