"""What a worker of a sweep does: keeps a model loaded, and measures the pieces it is given."""

import os
from pathlib import Path
from typing import Any

import torch

from kvtrim import files
from kvtrim.bench.eval.evaluate import Subject, Unit, measure, record, units
from kvtrim.bench.sweep.spec import Job, Piece
from kvtrim.errors import KvtrimError
from kvtrim.hf.models.load import load
from kvtrim.tasks.rows import Rows, reader

Result = dict[str, Any]


class Worker:
    """A process of a sweep. Every piece has its own folder, in which a piece is gone on with."""

    def __init__(self, folder: str | None = None):
        if folder is not None:  # relative names are seen from there
            os.chdir(folder)
        self._subject: Subject | None = None
        self._job: Job | None = None
        self._rows: Rows | None = None
        self._units: list[Unit] = []

    def do(self, piece: Piece) -> Result:
        """What came of a piece: {"error": ...} if kvtrim refused it."""
        try:
            return {"process": os.getpid(), **self._do(piece)}
        except KvtrimError as error:
            return {"error": f"{piece.job.name}: {error}"}

    def _do(self, piece: Piece) -> Result:
        subject, grid = self._prepare(piece.job)
        if not piece.stop:
            assert self._rows is not None
            planned = [(task.name, len(samples)) for task, samples in self._units]
            return {"record": record(subject, grid, self._rows), "units": planned}
        folder = Path(piece.folder)
        files.make_folder(folder, parents=True)
        chosen = self._units[piece.start : piece.stop]
        measure(subject, grid, chosen, folder, wait=True)
        return {}

    def _prepare(self, job: Job) -> tuple[Subject, Any]:
        """The model of a job, loaded unless it is there, and its units."""
        if self._subject is None or self._job is None or _model(self._job) != _model(job):
            self._subject = None  # frees the last one first
            if job.threads is not None:
                torch.set_num_threads(job.threads)
            self._subject = Subject(
                job.model, *load(job.model, device=job.device, dtype=job.dtype)
            )
        grid = job.grid()
        if self._job != job:
            self._rows = reader(job.data)
            self._units = units(self._subject, grid, self._rows)
            self._job = job
        return self._subject, grid


def _model(job: Job) -> tuple[Any, ...]:
    return job.model, job.device, job.dtype
