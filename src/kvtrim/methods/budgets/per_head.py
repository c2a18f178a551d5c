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

from kvtrim.errors import UsageError
from kvtrim.methods.budgets.base import Budget, Ledger, Uniform, lift
from kvtrim.methods.ranges import Share
from kvtrim.methods.unit import highest
from kvtrim.types import Counts, Float, Int, Room, Scores, Tensor


@dataclass(frozen=True)
class PerHead(Budget):
    floor: Share = 0.2  # the share that is dealt out evenly: 1 is uniform, 0 pure competition
    rule: Literal["blend", "floor"] = "blend"  # how floor is meant: AdaKV's way or kvpress's
    floor_of: Literal["layer", "keep"] = "layer"  # a share of what the layer got, or of `keep`
    normalize: bool = False  # weigh each head by the share of its scores that its top entries hold
    exact: bool = False  # meet the layer's total exactly; the public rule misses it by rounding
    layers: Budget = field(default_factory=Uniform)  # what each layer gets before heads compete

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize and self.model_wide:
            raise UsageError("normalize needs a layer's final share; leave it out here")

    @property
    def model_wide(self) -> bool:
        return self.layers.model_wide

    @property
    def holds_more(self) -> str:
        own = "each head's floor is a share of keep, not of its layer (floor_of=keep)"
        texts = [own if self.floor_of == "keep" else self._rounded, self.layers.holds_more]
        return "; ".join(filter(None, texts))

    @property
    def holds_less(self) -> str:
        return "; ".join(filter(None, [self._rounded, self.layers.holds_less]))

    @property
    def _rounded(self) -> str:
        met = self.exact or self.rule == "floor"
        return "" if met else "each head's part is rounded by itself (exact=true: the total)"

    def counts(self, room: Room, scores: Scores) -> Counts:
        base = self.layers.counts(room, scores)  # [B, K]
        return self.divide(room, base, self.winners(room, scores, base))

    def open(self) -> Ledger:
        return _Heads(self, self.layers.open())

    def winners(self, room: Room, scores: Scores, base: Counts) -> Int[Tensor, "B KN"]:
        """The head of a layer's best entry, of its second best, and so on."""
        if self.rule == "floor":  # kvpress: the best of each head are safe before any other
            safe = max(0, int(self.floor * room.keep) - room.protected)
            scores = lift(scores, safe)
        elif self.normalize:
            scores = self._weighed(scores, base)
        order = scores.flatten(1).argsort(dim=-1, descending=True, stable=True)
        return (order // max(1, scores.shape[-1])).int()

    def divide(self, room: Room, base: Counts, winners: Int[Tensor, "B KN"]) -> Counts:
        """What each head gets of the layer's total, given whose the best entries are."""
        won = _first_of_each(winners, base)
        if self.rule == "floor":
            return won
        # AdaKV: caps = round(won * (1 - floor) + base * floor), half to even
        even = (base.double() if self.floor_of == "layer" else base * 0.0 + room.keep) * self.floor
        ideal = won.double() * (1 - self.floor) + even.floor()
        caps = ideal.round().long()
        if self.exact:
            caps = _repair(caps, ideal, base.sum(dim=-1))
        caps = caps.clamp(max=room.candidates)
        return torch.where(base >= room.candidates, base, caps)

    def _weighed(self, scores: Scores, base: Counts) -> Scores:
        """Scores times the share of their head's that its best `base` entries hold.

        Slots that a head does not have (-inf) count nothing and stay last.
        """
        absent = scores.isneginf()
        ordered = scores.sort(dim=-1, descending=True).values
        ordered = ordered.masked_fill(ordered.isneginf(), 0)
        inside = torch.arange(scores.shape[-1]) < base[..., None]
        top = (ordered * inside.to(scores.device)).sum(dim=-1, keepdim=True)
        whole = ordered.sum(dim=-1, keepdim=True)
        share = torch.where(whole == 0, 1, top / torch.where(whole == 0, 1, whole))
        return (scores.masked_fill(absent, 0) * share).masked_fill(absent, -torch.inf)


class _Heads(Ledger):
    """Heads compete inside what a model-wide budget deals to each layer."""

    def __init__(self, budget: PerHead, layers: Ledger):
        self.budget, self.layers = budget, layers
        self.seen: list[tuple[Room, Int[Tensor, "B KN"]]] = []
        self.dealt: list[Counts] = []

    def add(self, room: Room, scores: Scores, wanted: Float[Tensor, " B"]) -> list[Counts]:
        bases = self.layers.add(room, scores, wanted)
        self.seen.append((room, self.budget.winners(room, scores, bases[-1])))
        now = [
            self.budget.divide(own, base, winners)
            for (own, winners), base in zip(self.seen, bases, strict=True)
        ]
        before = [*self.dealt, now[-1]]
        self.dealt = [new.minimum(old) for new, old in zip(now, before, strict=True)]
        return self.dealt


def _first_of_each(winners: Int[Tensor, "B KN"], base: Counts) -> Counts:
    """How many of a layer's best entries, as many as `base` [B, K] adds up to, each head has."""
    totals = base.sum(dim=-1)
    best = winners[:, : int(totals.max())].long()
    taken = torch.arange(best.shape[-1]) < totals[:, None]
    won = torch.zeros(base.shape, dtype=torch.int64, device=winners.device)
    return won.scatter_add_(1, best, taken.long().to(winners.device)).cpu()


def _repair(caps: Counts, ideal: Tensor, totals: Tensor) -> Counts:
    """Largest remainder: spread what rounding gained or lost so that each layer's total is met."""
    whole = ideal.floor().long()
    missing = totals - whole.sum(dim=-1)  # [B]
    share, rest = missing // caps.shape[-1], missing % caps.shape[-1]
    return whole + share[:, None] + highest(ideal - whole, rest).long()
