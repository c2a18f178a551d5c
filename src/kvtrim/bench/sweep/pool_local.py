"""Workers of a sweep as processes on this machine; each with a GPU where there are any.

Without GPUs they are forked from one process that has loaded what all of them need. With GPUs each
loads it by itself: a process that has looked for CUDA must not be forked.
"""

import multiprocessing
import os
import threading
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from kvtrim.bench.sweep.spec import Piece


class LocalPool:
    """Processes that are told through pipes what to do.

    Args:
        size: how many; by default as many as there are GPUs for, or one.
        gpus: of each.
    """

    def __init__(self, size: int | None = None, gpus: int = 1):
        self._gpus = gpus
        self._slots = max(1, torch.cuda.device_count() // gpus) if torch.cuda.is_available() else 0
        self.size = size or self._slots or 1
        forked = not self._slots and "forkserver" in multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context("forkserver" if forked else "spawn")
        if forked:
            self._context.set_forkserver_preload(["kvtrim.bench.sweep.worker"])
        self._workers: dict[Any, tuple[Any, int]] = {}  # process: its pipe, the place of its GPUs

    @property
    def processes(self) -> list[int]:
        """Their process numbers."""
        return [process.pid for process in self._workers]

    def start(self) -> Any:
        """A new worker; it shares GPUs only if there are fewer of them than workers need."""
        taken = [slot for _, slot in self._workers.values()]
        slot = min(range(self._slots), key=taken.count) if self._slots else -1
        seen = _visible(slot * self._gpus, self._gpus) if self._slots else None
        ours, theirs = self._context.Pipe()
        own = theirs, seen, self.size
        process = self._context.Process(target=serve, args=own, daemon=True)
        process.start()
        theirs.close()
        self._workers[process] = ours, slot
        return process

    def give(self, worker: Any, piece: Piece) -> None:
        """Let an idle worker do a piece."""
        try:
            self._workers[worker][0].send(piece)
        except OSError:
            pass  # it has died since; `wait` finds out

    def wait(self) -> tuple[Any, dict[str, Any] | None]:
        """The next worker to be done, and what it made; None if it died."""
        pipes = {pipe: process for process, (pipe, _) in self._workers.items()}
        pipe: Any = wait(list(pipes))[0]
        process = pipes[pipe]
        try:
            return process, pipe.recv()
        except (EOFError, OSError):
            del self._workers[process]
            process.join()
            return process, None

    def close(self) -> None:
        """End all workers."""
        for process, (pipe, _) in self._workers.items():
            pipe.close()
            process.terminate()
        for process in self._workers:
            process.join()
        self._workers = {}


def serve(pipe: Connection, gpus: str | None, workers: int) -> None:
    """A worker's life: pieces come, results go, until the driver is gone.

    Args:
        gpus: those that the worker may use, as CUDA_VISIBLE_DEVICES has them; None without any.
        workers: how many share the CPUs.
    """
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    elif workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    from kvtrim.bench.sweep.worker import Worker

    threading.Thread(target=_end_with_driver, daemon=True).start()
    worker = Worker()
    while True:
        try:
            piece = pipe.recv()
        except EOFError:
            return
        pipe.send(worker.do(piece))


def _end_with_driver() -> None:
    """End this process once its driver has, whatever it is at; what it wrote is gone on with."""
    driver = multiprocessing.parent_process()
    if driver is not None:
        driver.join()
        os._exit(1)


def _visible(first: int, count: int) -> str:
    """So many GPUs among those that the driver may use."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = torch.cuda.device_count()
    names = allowed.split(",") if allowed else [str(number) for number in range(there)]
    return ",".join(names[first : first + count])
