"""Per head: a layer's total stays, its heads compete for it in one flat top-k, with a floor.

Rule:  blend: a head keeps (1 - floor) x the number of its entries among the layer's best, plus
       floor x the even share, rounded. floor: the best of every head up to floor x its share are
       safe, then the best of the layer fill what is left.
Paper: Feng et al. 2024 (AdaKV), https://arxiv.org/abs/2407.11550, Algorithms 1 and 2.
Code:  FFY0/AdaKV@efe4e2e, adaptive_snapkv/monkeypatch/snapkv_utils.py ("blend");
       NVIDIA/kvpress@8bb29b9, presses/adakv_press.py ("floor").
Ours:  the memory is really freed per head; `exact` repairs the public rule's rounding.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch

from kvtrim.budgets.base import Budget
from kvtrim.budgets.uniform import Uniform
from kvtrim.errors import UsageError
from kvtrim.types import Counts, Room, Scores, Tensor


@dataclass(frozen=True)
class PerHead(Budget):
    floor: float = 0.2  # the share that is dealt out evenly: 1 is uniform, 0 pure competition
    rule: Literal["blend", "floor"] = "blend"  # how floor is meant: AdaKV's way or kvpress's
    normalize: bool = False  # weigh each head by the share of its scores that its top entries hold
    exact: bool = False  # meet the layer's total exactly; the public rule misses it by rounding
    layers: Budget = field(default_factory=Uniform)  # what each layer gets before heads compete

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise UsageError(f"floor is a share between 0 and 1, got {self.floor}")

    def counts(self, room: Room, scores: Scores) -> Counts:
        base = self.layers.counts(room, scores)  # [B, K]
        if room.free >= room.candidates:
            return base
        if self.rule == "floor":
            return self._floor(room, scores, base)
        return self._blend(room, scores, base)

    def _blend(self, room: Room, scores: Scores, base: Counts) -> Counts:
        """AdaKV: caps = round(won * (1 - floor) + base * floor), half to even."""
        won = flat_counts(self._weighed(scores, base), base.sum(dim=-1))
        even = (base.double() * self.floor).floor()
        ideal = won.double() * (1 - self.floor) + even
        caps = ideal.round().long()
        if self.exact:
            caps = _repair(caps, ideal, base.sum(dim=-1))
        return caps.clamp(max=room.candidates)

    def _floor(self, room: Room, scores: Scores, base: Counts) -> Counts:
        """kvpress: the best of each head are safe first, the rest goes to the best of the
        layer.
        """
        safe = max(0, int(self.floor * room.keep) - room.protected)
        ranks = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        lifted = scores.masked_fill(ranks < safe, torch.inf)
        return flat_counts(lifted, base.sum(dim=-1))

    def _weighed(self, scores: Scores, base: Counts) -> Scores:
        if not self.normalize:
            return scores
        ordered = scores.sort(dim=-1, descending=True).values
        inside = torch.arange(scores.shape[-1]) < base[..., None]
        top = (ordered * inside.to(scores.device)).sum(dim=-1, keepdim=True)
        return scores * top / ordered.sum(dim=-1, keepdim=True)


def flat_counts(scores: Scores, totals: Tensor) -> Counts:
    """How many of a layer's best `totals` [B] entries lie in each head; ties to the lower slot."""
    batch, heads, width = scores.shape
    order = scores.flatten(1).argsort(dim=-1, descending=True, stable=True)
    best = order[:, : int(totals.max())]
    taken = torch.arange(best.shape[-1]) < totals[:, None]
    won = torch.zeros(batch, heads, dtype=torch.int64, device=scores.device)
    return won.scatter_add_(1, best // width, taken.long().to(scores.device)).cpu()


def _repair(caps: Counts, ideal: Tensor, totals: Tensor) -> Counts:
    """Largest remainder: spread what rounding gained or lost so that each layer's total is met."""
    whole = ideal.floor().long()
    missing = totals - whole.sum(dim=-1)  # [B]
    ranks = (ideal - whole).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    share = missing[:, None] // caps.shape[-1]
    return whole + share + (ranks < (missing[:, None] % caps.shape[-1])).long()
