"""Whole heads: those that a table says matter keep everything, the others only what always stays.

Each KV head has one score, measured once per model and the same for every text. As many heads, the
best first, keep all n tokens as fit into the model's entries beside the others' sinks and window,
p of them in each of L K heads:

    whole = floor(L K (keep - p) / (n - p))

What is left, less than one head takes, goes to the others in equal parts (`spread`).

Paper: Xiao et al. 2024 (DuoAttention), https://arxiv.org/abs/2410.10819; Kim et al. 2025 (KVzip),
       https://arxiv.org/abs/2505.23416, head-level eviction.
Code:  mit-han-lab/duo-attention@fe93c31, duo_attn/utils.py; snu-mllab/KVzip@5d84729, utils/func.py
       (a head's score is the largest of its entries', over texts too).
Ours:  scores come from `kvtrim calibrate heads`, not from trained gates: retrieval (`reason`,
       `copy`) or KVzip's (`kvzip`); the number of whole heads follows from `keep`.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from kvtrim.methods.budgets import head_scores
from kvtrim.methods.budgets.base import Budget, everyone
from kvtrim.methods.ranges import Number
from kvtrim.methods.unit import highest
from kvtrim.types import Bool, Counts, Room, Scores, Target


@dataclass(frozen=True)
class WholeHeads(Budget):
    table: str = head_scores.AUTO  # a file, or the name of a shipped table; auto: one of this very
    # model; random: drawn scores, to measure speed where no table is at hand
    measure: Literal["retrieval", "kvzip"] = "retrieval"  # which of a model's tables auto takes
    group: Literal["max", "mean"] = "max"  # a KV head's score from those of its query heads
    threshold: Number | None = None  # heads that score less keep nothing whole, even if they fit
    spread: bool = True  # entries that no whole head fits into go to the others; else unused

    def __post_init__(self) -> None:
        super().__post_init__()
        head_scores.require_readable(self.table)

    @property
    def holds_less(self) -> str:
        return "" if self.spread else "what no whole head fits into is lost (spread=true)"

    def fitted(self, target: Target) -> "WholeHeads":
        wanted = ("kvzip",) if self.measure == "kvzip" else head_scores.RETRIEVAL
        return replace(self, table=head_scores.table_for(self.table, target, wanted))

    def counts(self, room: Room, scores: Scores) -> Counts:
        if room.free >= room.candidates:
            return everyone(room.candidates, scores)
        whole, total = self.whole(room), room.layers * room.heads * room.free
        rest = total - int(whole.sum()) * room.candidates
        others = int((~whole).sum())
        each = rest // others if self.spread and others else 0
        own = torch.where(whole[room.layer], room.candidates, min(each, room.candidates))
        return own.expand(scores.shape[:2]).clone()

    def whole(self, room: Room) -> Bool[torch.Tensor, "L K"]:
        """Which heads of the model keep everything."""
        table = head_scores.of(self.table, "this model", room.layers, room.heads * room.group)
        grouped = table.unflatten(1, (room.heads, room.group))
        own = (grouped.amax(dim=-1) if self.group == "max" else grouped.mean(dim=-1)).flatten()
        fit = room.layers * room.heads * room.free // room.candidates
        chosen = highest(own[None], torch.tensor([fit]))[0]
        if self.threshold is not None:
            chosen &= own >= self.threshold
        return chosen.view(room.layers, room.heads)
