"""Evicting among the generated tokens alone: what was kept of the prompt stays for good.

Papers: ShotKV, https://arxiv.org/abs/2502.01941 v4: two pools, of which only the second is cut on.
        PyramidInfer, https://arxiv.org/abs/2405.12532: blocks that are no longer recent are cut.
Code:   mutonix/pyramidinfer@61ac641 tests a layer's own length against all that was seen, and so
        cuts narrowed layers at every step; here every layer counts generated tokens, as meant.
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
from kvtrim.methods.policies.ops import newest
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
        recent = max(policy.recent(self.keep), schedule.newest_behind(self.start))
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


@dataclass
class BlockTrimmer(Cutter):
    """Cuts the block of generated tokens that stands right behind the newest ones."""

    method: Method
    window: int  # newest tokens, which stay and are asked
    keep: int  # tokens of a block
    share: float  # of a block, that stays in a layer that has all of it

    def choose(self, view: LayerView, share: Counts | None = None) -> Kept | None:
        """See `Cutter.choose`."""
        policy, schedule = self.method.policy, self.method.schedule
        if view.index in self.method.skip_layers:
            return None
        stay = max(
            1, int(self.keep * self.share * schedule.share_of_layer(view.index, view.layers))
        )
        last = view.tokens - self.window
        counts, slots = torch.full(view.keys.shape[:2], stay), view.keys.shape[2]
        held = torch.full_like(counts, slots) if view.lengths is None else view.lengths
        kept = select(
            checked_score(policy, newest(view, max(policy.lookback(), self.window))),
            counts,
            slots if view.lengths is None else view.lengths,
            recent=self.window,
            protected=view.positions < last - self.keep,
        )
        return None if torch.equal(kept.counts, held) else kept


def newest_tokens(method: Method, start: int) -> int:
    """How many of the newest tokens no block reaches, of an answer that begins at `start`."""
    own = 1 + method.schedule.newest_behind(start)
    return max(own, method.policy.recent(method.schedule.every or 1))


def asked_of_blocks(method: Method, state: State) -> int:
    """How many of the newest queries are asked about blocks, under a schedule that has them."""
    return max((newest_tokens(method, start) for start, _ in state.generated), default=0)


def trimmers(method: Method, state: State, now: Pass, groups: Sequence[slice]) -> Cutters:
    """One for each group of prompts, whose generated tokens began at the same place."""
    pools: list[tuple[slice, Cutter]] = []
    lengths, every = now.lengths(), method.schedule.every or 1
    for rows in groups:
        start, share = state.generated[rows.start]
        if method.schedule.region == "blocks":
            own = newest_tokens(method, start), every, share
            pools.append((rows, BlockTrimmer(method, *own)))
            continue
        keep = max(1, ceil(share * (lengths[rows.start] - start) - 1e-6))
        pools.append((rows, Trimmer(method, start, keep)))
    return pools
