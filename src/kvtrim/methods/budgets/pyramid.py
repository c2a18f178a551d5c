"""Pyramid: low layers keep more, high layers less, in even steps.

Rule:  the last layer keeps mean / beta, the first 2 x mean minus that, those between lie on the
       line; no layer keeps more than there is.
Paper: Cai et al. 2024 (PyramidKV), https://arxiv.org/abs/2406.02069, section 3.2.
Code:  Zefan-Cai/KVCache-Factory@c97f9d7, pyramidkv/pyramidkv_utils.py ("kvf");
       FFY0/AdaKV@efe4e2e, pyram option ("adakv"); NVIDIA/kvpress@8bb29b9, pyramidkv_press.py.
Ours:  `exact` hands out what the integer steps of the public rule lose or overspend, so that the
       mean over layers is the budget asked for; one layer alone is uniform (public code divides
       by 0).
"""

from dataclasses import dataclass
from typing import Literal

from kvtrim.methods.budgets.base import Budget, everyone
from kvtrim.methods.ranges import Some
from kvtrim.types import Counts, Room, Scores


@dataclass(frozen=True)
class Pyramid(Budget):
    beta: Some = 20  # the last layer keeps about 1 / beta of the mean
    rounding: Literal["kvf", "adakv", "kvpress"] = "kvf"  # whose public code's steps
    exact: bool = False  # meet the mean exactly; integer steps miss it

    @property
    def holds_more(self) -> str:
        return "" if self.exact else "integer steps from layer to layer (exact=true: the mean)"

    @property
    def holds_less(self) -> str:
        return self.holds_more

    def counts(self, room: Room, scores: Scores) -> Counts:
        entries = self.entries(room)
        return everyone(max(0, min(entries, room.candidates)), scores)

    def entries(self, room: Room) -> int:
        """Candidates that one head of this layer keeps, before clipping to what there is."""
        if room.layers == 1:
            return room.free
        if self.rounding == "kvpress":
            return self._float_entries(room)
        mean = room.keep - room.protected
        if self.rounding == "kvf" and room.candidates + room.protected < 2 * mean:
            return mean
        low = mean // self.beta
        high = 2 * mean - low
        if high >= room.candidates:
            high, low = room.candidates, 2 * mean - room.candidates
        step = (high - low) // (room.layers - 1)
        entries = high - room.layer * step
        if not self.exact:
            return entries
        spare = room.layers * mean - sum(high - layer * step for layer in range(room.layers))
        share, odd = divmod(spare, room.layers)
        return entries + share + (room.layer < odd)

    def _float_entries(self, room: Room) -> int:
        """kvpress: float steps, rounded, and the window counts inside each layer's number."""
        mean, window = room.asked, room.protected
        low = mean / self.beta
        high = 2 * mean - low
        if high >= room.candidates:
            high, low = float(room.candidates), 2.0 * mean - room.candidates
        if not room.candidates + window >= high >= low >= window:
            return round(mean) - window
        step = (high - low) / (room.layers - 1)
        return round(high - room.layer * step) - window
