"""Head table: scores that were measured once per model decide what every head may keep.

Each head gets a small floor; the rest of the model's budget is one pool, dealt out by the heads'
shares of all scores. The counts are the same for every prompt, and differ over heads and layers:

    b = keep - window;  per = b // beta;  floor = b - per
    cap[layer, head] = round(share[layer, head] * per * L * H + floor)

A larger `beta` makes the pool smaller and the counts more alike. It costs nothing while a model
runs, and needs a table of that very model (`kvtrim calibrate heads`).

Paper: Fu et al. 2024 (HeadKV), https://arxiv.org/abs/2410.19258, section 3.
Code:  FYYFU/HeadKV@0862a09, headkv/snapkv_utils.py; Zefan-Cai/KVCache-Factory@c97f9d7
       (`window_inside=False`: pool and floor come from all of `keep`, the window on top).
Ours:  keys are parsed, not trusted to be in order; a KV head gets the mean of its query heads'
       caps, which keeps the total; `redistribute` hands on what a head cannot use.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import torch

from kvtrim.methods.budgets import head_scores
from kvtrim.methods.budgets.base import Budget, everyone
from kvtrim.methods.ranges import Positive, Range
from kvtrim.types import Counts, Float, Int, Room, Scores, Target, Tensor


@dataclass(frozen=True)
class HeadTable(Budget):
    table: str = (
        head_scores.AUTO
    )  # a file, or the name of a shipped table; auto: one of this very model;
    # random: drawn scores, to measure speed where no table is at hand
    beta: Annotated[float, Range(1)] = 1.2  # the pool is one beta-th of the budget
    temp: Positive = 1.0  # exponent on the shares: above 1 sharper, below 1 flatter
    window_inside: bool = True  # `keep` includes the window; False stores keep + window (KVF)
    redistribute: bool = False  # what exceeds the prompt goes to other heads instead of being lost

    def __post_init__(self) -> None:
        super().__post_init__()
        head_scores.require_readable(self.table)

    @property
    def holds_more(self) -> str:
        return "" if self.window_inside else "the window comes on top (window_inside=false)"

    @property
    def holds_less(self) -> str:
        if self.redistribute:
            return ""
        return "what a head's share exceeds the prompt by is lost (redistribute=true deals it out)"

    def fitted(self, target: Target) -> "HeadTable":
        return replace(
            self, table=head_scores.table_for(self.table, target, head_scores.RETRIEVAL)
        )

    def counts(self, room: Room, scores: Scores) -> Counts:
        if room.free >= room.candidates:
            return everyone(room.candidates, scores)
        own = self.caps(room)[room.layer].clamp(max=room.candidates)
        return own.expand(scores.shape[:2]).clone()

    def caps(self, room: Room) -> Int[Tensor, "L K"]:
        """Candidates that each head of the model may keep, before clipping to what there is."""
        table = head_scores.of(self.table, "this model", room.layers, room.heads * room.group)
        shares = (table / table.sum()) ** self.temp
        shares = shares / shares.sum()
        base = max(0, room.keep - (room.protected if self.window_inside else 0))
        per = base // self.beta  # of floats, as the public code has it
        caps = (shares * (per * table.numel()) + (base - per)).round()
        caps = caps.unflatten(1, (room.heads, room.group)).mean(dim=-1).round()
        if self.redistribute:
            weights = shares.unflatten(1, (room.heads, room.group)).mean(dim=-1)
            caps = dealt_again(caps, weights, room.candidates)
        return caps.long()


def dealt_again(
    caps: Float[Tensor, "L K"], weights: Float[Tensor, "L K"], most: int
) -> Float[Tensor, "L K"]:
    """At most `most` per head; what is above goes to heads with room, by their weights."""
    while bool((caps > most).any()):
        excess = (caps - most).clamp(min=0).sum()
        caps = caps.clamp(max=most)
        open_ = (caps < most).double()
        shares = weights * open_ if float((weights * open_).sum()) > 0 else open_
        caps = caps + excess * shares / shares.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return caps.round()
