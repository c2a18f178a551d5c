"""Workers of a sweep on a Ray cluster, on this machine or on many; each with a GPU of its own.

The folder of the sweep, models and data must be on storage that all machines see. Their names may
be relative: workers begin in the driver's working folder.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from kvtrim.bench.sweep.spec import Piece
from kvtrim.errors import UsageError


def require() -> Any:
    """The package.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import ray
    except ImportError:
        raise UsageError("--ray needs Ray: pip install 'kvtrim[ray]'") from None
    return ray


class RayPool:
    """Actors, one for each GPU of the cluster, else as many as its CPUs are enough for.

    Args:
        address: of a cluster ("auto", "ray://host:10001"); a new one on this machine by default.
        size: workers; by default one for each GPU, or for each `threads` CPUs. More than that
            have no place and are not started.
        threads: CPUs of a worker, where there is no GPU.
        gpus: of a worker, where there are any.

    Raises:
        UsageError: Ray is not installed, no cluster is there, or none of its machines has room
            for a worker.
    """

    def __init__(
        self,
        address: str | None = None,
        size: int | None = None,
        threads: int | None = None,
        gpus: int = 1,
    ):
        self._ray = require()
        self._ours = not self._ray.is_initialized()
        if self._ours:
            try:
                self._ray.init(address, include_dashboard=False, log_to_driver=False)
            except (ConnectionError, ValueError) as error:
                raise UsageError(f"no Ray cluster at {address}: {error}") from error
        machines = [one["Resources"] for one in self._ray.nodes() if one["Alive"]]
        needs, self.room = _room(machines, threads or 1, gpus)
        self.size = min(size or self.room, self.room)
        self._actor = self._ray.remote(max_restarts=0, **needs)(_worker())
        self._busy: dict[Any, Any] = {}
        self._numbers: dict[Any, int] = {}

    @property
    def processes(self) -> list[int]:
        """The process numbers of the workers, as far as they have done something."""
        return list(self._numbers.values())

    def start(self) -> Any:
        """A new worker."""
        return self._actor.remote(folder=os.getcwd())

    def give(self, worker: Any, piece: Piece) -> None:
        """Let an idle worker do a piece."""
        self._busy[worker.do.remote(piece)] = worker

    def wait(self) -> tuple[Any, dict[str, Any] | None]:
        """The next worker to be done, and what it made; None if it died."""
        (done, *_), _ = self._ray.wait(list(self._busy), num_returns=1)
        worker = self._busy.pop(done)
        try:
            result = self._ray.get(done)
        except self._ray.exceptions.RayActorError:
            self._numbers.pop(worker, None)
            return worker, None
        self._numbers[worker] = result.get("process", 0)
        return worker, result

    def close(self) -> None:
        """End all workers."""
        self._busy = {}
        if self._ours:
            self._ray.shutdown()


def _room(
    machines: Sequence[Mapping[str, float]], threads: int, gpus: int
) -> tuple[dict[str, int], int]:
    """What a worker needs, and how many of them the machines have room for."""
    if any(one.get("GPU", 0) >= 1 for one in machines):
        needs, asked = {"num_gpus": gpus, "num_cpus": 1}, f"gpus = {gpus}"
    else:
        needs, asked = {"num_cpus": threads}, f"threads = {threads}"
    names = {"num_gpus": "GPU", "num_cpus": "CPU"}
    room = sum(
        min(int(one.get(names[what], 0)) // count for what, count in needs.items())
        for one in machines
    )
    if not room:
        raise UsageError(f"no machine of the Ray cluster has room for a worker: {asked}; use less")
    return needs, room


def _worker() -> type:
    from kvtrim.bench.sweep.worker import Worker

    return Worker
