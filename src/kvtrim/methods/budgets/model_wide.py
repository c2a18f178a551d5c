"""Global: one top-k over the scores of all layers, heads and tokens together.

Paper: LaProx, https://arxiv.org/abs/2605.07234, Algorithm 2;
       KVzip, https://arxiv.org/abs/2505.23416.
Ours:  a pool of the best entries so far is carried from layer to layer, and what falls out of it
       is freed. The result equals the top-k of all layers side by side: ties go to the lower
       layer, then head, then position.
"""

from dataclasses import dataclass

import torch

from kvtrim.methods.budgets.base import Ledger, ModelWide, lift
from kvtrim.methods.ranges import Number, Share
from kvtrim.methods.unit import highest
from kvtrim.types import Bool, Counts, Float, Int, Room, Scores, Tensor


@dataclass(frozen=True)
class Global(ModelWide):
    floor: Share = 0.0  # the share of `keep` that every head gets whatever its scores
    threshold: Number | None = None  # entries that score less go, even if there is room for them
    anew: bool = False  # cuts after the first are dealt anew, not by what each head won; for
    # scores that mean the same at every cut

    @property
    def selective(self) -> bool:
        return self.threshold is not None

    @property
    def settles(self) -> bool:
        return not self.anew

    def open(self) -> Ledger:
        return _Pool(self.floor, -torch.inf if self.threshold is None else self.threshold)


class _Pool(Ledger):
    """The best entries so far, in order: score, and owner (layer and head in one number)."""

    def __init__(self, floor: float, threshold: float):
        self.floor, self.threshold = floor, threshold
        self.scores: Float[Tensor, "B E"] | None = None
        self.owners: Int[Tensor, "B E"] | None = None
        self.layers = 0

    def add(self, room: Room, scores: Scores, wanted: Float[Tensor, " B"]) -> list[Counts]:
        batch, heads, width = scores.shape
        safe = int(self.floor * room.free)
        new = (lift(scores, safe) if safe else scores).flatten(1)
        owner = torch.arange(heads, device=scores.device).repeat_interleave(width)
        owners = (self.layers * heads + owner).expand(batch, -1)
        if self.scores is not None and self.owners is not None:
            new = torch.cat([self.scores, new], dim=1)
            owners = torch.cat([self.owners, owners], dim=1)
        self.layers += 1
        entries = room.layers * heads * room.free
        if entries < new.shape[1]:
            best = highest(new, torch.full((batch,), entries))
            new, owners = new[best].view(batch, -1), owners[best].view(batch, -1)
        self.scores, self.owners = new, owners
        worth = (self.scores >= self.threshold) & ~self.scores.isneginf()
        return self._deal(self.owners, worth, batch, heads)

    def _deal(
        self, owners: Int[Tensor, "B E"], worth: Bool[Tensor, "B E"], batch: int, heads: int
    ) -> list[Counts]:
        won = torch.zeros(batch, self.layers * heads, dtype=torch.int64, device=owners.device)
        won.scatter_add_(1, owners, worth.long())
        return list(won.cpu().unflatten(1, (self.layers, heads)).unbind(1))
