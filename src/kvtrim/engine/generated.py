"""Evicting among the generated tokens alone: what was kept of the prompt stays for good.

Paper: ShotKV, https://arxiv.org/abs/2502.01941 v4: two pools, of which only the second is cut on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch

from kvtrim.engine.eviction import Cutter, Cutters
from kvtrim.engine.state import State
from kvtrim.engine.tokens import Pass
from kvtrim.methods.method import Method
from kvtrim.methods.policies.base import checked_score
from kvtrim.methods.selection import select
from kvtrim.types import Counts, Kept, LayerView


@dataclass
class Trimmer(Cutter):
    """Applies one method to the generated tokens of prompts that are equally far."""

    method: Method
    start: int  # position of the first generated token
    keep: int  # generated tokens that stay, in every layer and head

    def choose(self, view: LayerView, share: Counts | None = None) -> Kept | None:
        """See `Cutter.choose`."""
        skipped = view.index in self.method.skip_layers
        if skipped or view.tokens - self.start <= self.keep:
            return None
        policy, schedule = self.method.policy, self.method.schedule
        recent = max(policy.recent(self.keep), schedule.newest)
        counts = torch.full(view.keys.shape[:2], max(0, self.keep - recent))
        held = torch.full_like(counts, view.keys.shape[2])
        kept = select(
            checked_score(policy, view),
            counts,
            int(held[0, 0]) if view.lengths is None else view.lengths,
            recent=recent,
            protected=view.positions < self.start,
        )
        held = held if view.lengths is None else view.lengths
        return None if torch.equal(kept.counts, held) else kept


def trimmers(method: Method, state: State, now: Pass, groups: Sequence[slice]) -> Cutters:
    """One for each group of prompts, whose generated tokens began at the same place."""
    pools: list[tuple[slice, Cutter]] = []
    lengths = now.lengths()
    for rows in groups:
        start, share = state.generated[rows.start]
        keep = max(1, ceil(share * (lengths[rows.start] - start) - 1e-6))
        pools.append((rows, Trimmer(method, start, keep)))
    return pools
