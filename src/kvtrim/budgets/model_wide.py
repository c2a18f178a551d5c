"""Global: one top-k over the scores of all layers, heads and tokens together.

Paper: LaProx, https://arxiv.org/abs/2605.07234, Algorithm 2;
       KVzip, https://arxiv.org/abs/2505.23416.
Ours:  a pool of the best entries so far is carried from layer to layer, and what falls out of it
       is freed. The result equals the top-k of all layers side by side: ties go to the lower
       layer, then head, then position.
"""

from dataclasses import dataclass

import torch

from kvtrim.budgets.base import Ledger, ModelWide
from kvtrim.errors import UsageError
from kvtrim.types import Counts, Float, Int, Room, Scores, Tensor


@dataclass(frozen=True)
class Global(ModelWide):
    floor: float = 0.0  # the share of `keep` that every head gets whatever its scores

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise UsageError(f"floor is a share between 0 and 1, got {self.floor}")

    def open(self) -> Ledger:
        return _Pool(self.floor)


class _Pool(Ledger):
    """The best entries so far, best first, as score and owner (layer and head in one number)."""

    def __init__(self, floor: float):
        self.floor = floor
        self.scores: Float[Tensor, "B E"] | None = None
        self.owners: Int[Tensor, "B E"] | None = None
        self.layers = 0

    def add(self, room: Room, scores: Scores, wanted: Float[Tensor, " B"]) -> list[Counts]:
        batch, heads, width = scores.shape
        lifted = self._lifted(scores, int(self.floor * room.free))
        new = lifted.flatten(1)
        owner = torch.arange(heads, device=scores.device).repeat_interleave(width)
        owners = (self.layers * heads + owner).expand(batch, -1)
        if self.scores is not None and self.owners is not None:
            new = torch.cat([self.scores, new], dim=1)
            owners = torch.cat([self.owners, owners], dim=1)
        self.layers += 1
        entries = room.layers * heads * room.free
        best = new.argsort(dim=1, descending=True, stable=True)[:, :entries]
        self.scores, self.owners = new.gather(1, best), owners.gather(1, best)
        return self._dealt(self.owners, batch, heads)

    def _dealt(self, owners: Int[Tensor, "B E"], batch: int, heads: int) -> list[Counts]:
        won = torch.zeros(batch, self.layers * heads, dtype=torch.int64, device=owners.device)
        won.scatter_add_(1, owners, torch.ones_like(owners))
        return list(won.cpu().unflatten(1, (self.layers, heads)).unbind(1))

    @staticmethod
    def _lifted(scores: Scores, safe: int) -> Scores:
        """The best `safe` of each head above every other score."""
        if safe == 0:
            return scores
        ranks = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return scores.masked_fill((ranks < safe) & ~scores.isneginf(), torch.inf)
