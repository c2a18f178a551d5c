"""Which replica a request belongs to: one that holds what it is about.

Replicas say twice a second what their memory holds, so that one that let go of a document is no
longer taken for its holder. Until a replica has said so, whoever was sent a document last is taken
to hold it: it reads it now. On Ray Serve a request router acts on it, one in every process that
sends requests.
"""

import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from typing import Any

from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

HOLDS = "holds"
"""The name under which a replica says what it holds."""

_REPORT_S = 0.5
_SETTLE_S = 5.0  # within which a report says what became of a request


class Whereabouts:
    """What is held where, by what replicas say and by what was sent to them.

    Args:
        clock: in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._held: Mapping[Any, Set[str]] = {}
        self._sent: dict[tuple[str, Hashable], float] = {}

    def note_holdings(self, held: Mapping[Any, Set[str]]) -> None:
        """What every replica says that it holds."""
        self._held = held
        for subject, replica in list(self._sent):
            if subject in held.get(replica, ()):
                del self._sent[subject, replica]  # from now on its own word counts

    def note_request(self, subject: str, replica: Hashable) -> None:
        """A replica was sent a request about this."""
        if subject not in self._held.get(replica, ()):
            self._sent[subject, replica] = self._clock()

    def ranks(self, subject: str, replicas: Sequence[Hashable]) -> list[list[Any]]:
        """All replicas, those to be tried first in front: holders, who holds least, the others."""
        now = self._clock()
        self._sent = {each: at for each, at in self._sent.items() if now < at + _SETTLE_S}
        held = {one: set(self._held.get(one, ())) for one in replicas}
        for sent, one in self._sent:
            held.setdefault(one, set()).add(sent)
        holders = [one for one in replicas if subject in held[one]]
        others = [one for one in replicas if subject not in held[one]]
        least = min((len(held[one]) for one in others), default=0)
        fewest = [one for one in others if len(held[one]) == least]
        rest = [one for one in others if len(held[one]) > least]
        return [rank for rank in (holders, fewest, rest) if rank]


class ByWhatIsHeld(RequestRouter):
    """Ray Serve's way to a replica, by the id that requests are sent with; any for none."""

    def initialize_state(self, **kwargs: Any) -> None:
        """As Ray Serve asks."""
        self._where = Whereabouts()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """These are there, and have said something new."""
        said = {one.replica_id: frozenset(one.routing_stats.get(HOLDS, ())) for one in replicas}
        self._where.note_holdings(said)
        super().update_replicas(replicas)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Replicas in ranks; of a rank, Ray Serve takes the one with the shortest queue."""
        mixed = random.sample(candidate_replicas, len(candidate_replicas))
        if pending_request is None:
            return [mixed]
        pending_request.routing_context.should_backoff = True  # when nobody has a place
        subject = pending_request.metadata.multiplexed_model_id
        if not subject:
            return [mixed]
        by_id = {one.replica_id: one for one in mixed}
        return [[by_id[at] for at in rank] for rank in self._where.ranks(subject, list(by_id))]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """As Ray Serve says."""
        if subject := pending_request.metadata.multiplexed_model_id:
            self._where.note_request(subject, replica_id)


def router_config() -> RequestRouterConfig:
    """What Ray Serve is to be told of it."""
    given: Any = {
        "request_router_class": ByWhatIsHeld,
        "request_routing_stats_period_s": _REPORT_S,
    }
    return RequestRouterConfig(**given)
