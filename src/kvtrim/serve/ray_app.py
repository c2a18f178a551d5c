"""Replicas of the server on a Ray cluster, and the way to them: Ray Serve routes by document.

Each replica is the whole application over a library that all share. It tells Ray Serve what its
memory holds, and requests about that go there (`serve.whereabouts`), as long as it has a place; a
replica that dies is replaced.
"""

import asyncio
import logging
import os
import socket
import sys
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from kvtrim.errors import KvtrimError, UsageError
from kvtrim.serve.front import Died
from kvtrim.serve.limits import Defaults, Limits
from kvtrim.serve.log import log_to_stderr
from kvtrim.serve.relay import Begun, Passed
from kvtrim.serve.request import SUBJECT, Refused
from kvtrim.serve.whereabouts import HOLDS, router_config

if TYPE_CHECKING:
    from kvtrim.serve.service import Service

log = logging.getLogger("kvtrim.serve")

_HEALTH_S = 2.0
_DRAIN_S = 30.0
_ASK_ALL_S = 10.0
_STREAM = b"text/event-stream"


@dataclass(frozen=True)
class Setup:
    """What every replica is made from; all of it is the same on every machine."""

    library: Path
    limits: Limits
    defaults: Defaults
    model: str
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None
    allow_untested: bool = False
    folder: str | None = None  # where relative names begin, and methods of one's own lie

    @property
    def id(self) -> str:
        """Of the model, as clients name it."""
        return Path(self.model).name


@dataclass(frozen=True)
class Description:
    """A replica: where it runs, and why it cannot serve, if so."""

    name: str
    machine: str
    process: int
    refusal: str | None
    usage: bool  # the user has to ask otherwise


class Replica:
    """One server without a socket. What kvtrim refuses at the start is told when asked."""

    def __init__(self, setup: Setup):
        self.name = serve.get_replica_context().replica_id.unique_id
        self._refused: KvtrimError | None = None
        self._under_way = Counter[str]()  # requests, by what they are about
        log_to_stderr()  # which Ray keeps
        try:
            self._service = _service(setup)
        except KvtrimError as error:
            self._refused = error
            return
        from kvtrim.serve.app import application

        self._app = application(self._service, behind_front=True)
        self._service.scheduler.start()

    async def describe(self) -> "Description":
        """Where it runs, and why it cannot serve, if so."""
        error = self._refused
        why = None if error is None else str(error)
        place = socket.gethostname(), os.getpid()
        return Description(self.name, *place, why, isinstance(error, UsageError))

    async def check_health(self) -> None:
        """Asked by Ray Serve, which replaces a replica that cannot go on."""
        if self._refused is None and not self._service.scheduler.alive:
            raise RuntimeError("the scheduler has ended")

    async def record_routing_stats(self) -> dict[str, list[str]]:
        """Asked by Ray Serve, which tells whoever routes."""
        held = set() if self._refused is not None else self._service.subjects()
        return {HOLDS: sorted(held.union(+self._under_way))}

    async def answer(self, passed: Passed) -> AsyncIterator[str | Begun | bytes]:
        """As `front.Replicas.answer`, whose Ray Serve has chosen this replica."""
        if subject := serve.get_multiplexed_model_id():
            self._under_way[subject] += 1
        try:
            yield self.name
            SUBJECT.set(subject)
            async for part in respond(self._app, passed, self.name):
                yield part
        finally:
            self._under_way -= Counter([subject])

    async def answer_alone(self, passed: Passed) -> Begun:
        """A response that is no stream."""
        async for part in respond(self._app, passed, self.name):
            if isinstance(part, Begun):
                return part
        raise RuntimeError("the application gave no response")


def _service(setup: Setup) -> "Service":
    """A model of its own; only here, since the front loads none.

    Raises:
        KvtrimError: the model or the library refuse.
    """
    from kvtrim.hf.models.load import load
    from kvtrim.serve.library import Library
    from kvtrim.serve.service import Service

    if setup.folder is not None and os.path.isdir(setup.folder):
        os.chdir(setup.folder)
        sys.path.append(setup.folder)
    if setup.threads is not None:
        import torch

        torch.set_num_threads(setup.threads)
    own = {"device": setup.device, "dtype": setup.dtype, "allow_untested": setup.allow_untested}
    model, tokenizer = load(setup.model, **own)
    library = Library(setup.library)
    return Service(setup.model, model, tokenizer, library, setup.limits, setup.defaults)


async def respond(app: Any, passed: Passed, name: str) -> AsyncIterator[Begun | bytes]:
    """An application's response: whole, or the beginning of a stream and what follows.

    A stream begins with its first bytes, not with its headers. Closing the iterator is as if the
    client had gone.
    """
    scope, messages = dict(passed.scope), asyncio.Queue[dict[str, Any] | None]()
    given = iter([{"type": "http.request", "body": passed.body, "more_body": False}])

    async def receive() -> dict[str, Any]:  # who stops waiting has cancelled no one else's future
        return next(given, None) or await asyncio.get_running_loop().create_future()

    async def run() -> None:
        try:
            await app(scope, receive, messages.put)
        except Exception as error:  # the application has said so to the client
            log.exception("the application failed", exc_info=error)
        finally:
            await messages.put(None)

    task = asyncio.ensure_future(run())
    try:
        start = await messages.get()
        if start is None:
            raise RuntimeError("the application gave no response")
        headers = [(bytes(n), bytes(v)) for n, v in start["headers"]]
        stream = any(n == b"content-type" and v.startswith(_STREAM) for n, v in headers)
        body, begun = b"", False
        while (part := await messages.get()) is not None:
            body += part.get("body", b"")
            if stream and body:
                route = getattr(scope.get("route"), "path", "other")
                yield body if begun else Begun(name, start["status"], headers, body, route, True)
                body, begun = b"", True
        if not begun:
            route = getattr(scope.get("route"), "path", "other")
            yield Begun(name, start["status"], headers, body, route)
    finally:
        task.cancel()
        await asyncio.wait({task})


class Cluster:
    """Replicas that were started, as a front asks them; ends them on leaving.

    Args:
        count: of replicas.
        address: of a running cluster ("auto"); a new one on this machine by default.

    Raises:
        UsageError: no cluster is there, or it has no room for so many; or a replica refuses its
            setup.
    """

    def __init__(self, setup: Setup, count: int, address: str | None = None):
        if count < 1:
            raise UsageError(f"{count} replicas: ask for 1 or more")
        if address is not None and address.startswith("ray://"):
            raise UsageError(
                "answers cannot stream through a Ray client: run kvtrim serve on a machine of the "
                "cluster, with --ray-address auto"
            )
        self._name, self._ours = _name(setup), not ray.is_initialized()
        logging.getLogger("ray").setLevel(logging.WARNING)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        if self._ours:
            _connect(address)
        self._own_cluster, self._started = self._ours and address is None, False
        try:
            needs = _room([one for one in ray.nodes() if one["Alive"]], setup, count)
            self._started = True
            self._handle = _run(setup, count, needs)
            self._require_willing()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the replicas, and the cluster if it was started for them."""
        if self._started and not self._own_cluster:
            serve.delete(self._name)
        if self._ours:
            ray.shutdown()  # with all that runs there

    def _require_willing(self) -> None:
        """See that all replicas can serve, and note where they run."""
        for said in self._handle.broadcast("describe").results(timeout_s=60):
            if said.refusal is not None:
                raise UsageError(said.refusal) if said.usage else KvtrimError(said.refusal)
            facts = {"replica": said.name, "machine": said.machine, "process": said.process}
            log.info("replica", extra={"facts": facts})

    async def answer(self, request: Passed, document: str) -> AsyncGenerator[Any, None]:
        """As `front.Replicas.answer`."""
        routed = self._handle.options(stream=True, multiplexed_model_id=document)
        stream = routed.answer.remote(request)
        done = False
        try:
            async for part in stream:
                yield part
            done = True
        except BackPressureError as error:
            done = True
            raise Refused("many requests wait; try again later", 429, 5) from error
        except (RayActorError, DeploymentUnavailableError) as error:
            done = True
            raise Died from error
        finally:
            if not done:
                stream.cancel()

    async def answer_all(self, request: Passed) -> list[Begun]:
        """As `front.Replicas.answer_all`."""
        asked = self._handle.broadcast("answer_alone", request)
        try:
            said = await asked.results_async(timeout_s=_ASK_ALL_S, return_exceptions=True)
        except (DeploymentUnavailableError, TimeoutError):
            return []
        return [each for each in said if isinstance(each, Begun)]


def _name(setup: Setup) -> str:
    """Of the application on a cluster: one for each model."""
    return f"kvtrim-{setup.id}"


def _connect(address: str | None) -> None:
    try:
        ray.init(
            address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
        )
    except (ConnectionError, ValueError) as error:
        raise UsageError(f"no Ray cluster at {address}: {error}") from error
    except Exception as error:  # Ray has no word of its own for what does not start
        raise KvtrimError(f"Ray did not start: {error}") from error


def _room(machines: Sequence[Mapping[str, Any]], setup: Setup, count: int) -> dict[str, float]:
    """What a replica needs.

    Raises:
        UsageError: the machines have no room for so many.
    """
    held = [one["Resources"] for one in machines]
    needs = {"num_cpus": setup.threads or 1}
    device = (setup.device or "cuda").partition(":")[0]
    if device == "cuda" and any(one.get("GPU", 0) >= 1 for one in held):
        needs = {"num_gpus": 1, "num_cpus": 1}
    names = {"num_gpus": "GPU", "num_cpus": "CPU"}
    room = sum(min(int(one.get(names[n], 0) // c) for n, c in needs.items()) for one in held)
    if room < count:
        said = ", ".join(f"{amount} {names[what]}" for what, amount in needs.items())
        raise UsageError(
            f"the Ray cluster has room for {room} of {count} replicas ({said} each): ask for "
            "fewer replicas or --threads, or add machines"
        )
    return {name: float(amount) for name, amount in needs.items()}


def _run(setup: Setup, count: int, needs: dict[str, float]) -> Any:
    """Start the replicas; the handle by which they are asked."""
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    limits = setup.limits
    serve.start(proxy_location="Disabled", logging_config=quiet)
    deployed: Any = serve.deployment(
        Replica,
        num_replicas=count,
        max_ongoing_requests=limits.batch + limits.uploads,
        max_queued_requests=limits.queue,
        health_check_period_s=_HEALTH_S,
        graceful_shutdown_timeout_s=_DRAIN_S,
        ray_actor_options=needs,
        logging_config=quiet,
        request_router_config=router_config(),
    )
    try:
        return serve.run(deployed.bind(setup), name=_name(setup), route_prefix=None)
    except RuntimeError as error:
        raise KvtrimError(f"the replicas did not start: {error}") from error
