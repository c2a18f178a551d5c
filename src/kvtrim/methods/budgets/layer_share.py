"""Layer share: each layer gets a part of the model's budget, by how much it asks for.

What a layer asks for is its policy's `preference`: by default the entropy of its scores, so that
layers whose scores are flat get more (LAVa); CAKE measures how dispersed and how shifting the
window's attention is. Shares shrink as later layers join, and earlier layers are cut again.

Paper: LAVa, https://arxiv.org/abs/2509.09754; CAKE, https://arxiv.org/abs/2503.12491, section 4.
Code:  MGDDestiny/Lava@71d3cc8, adaptive_snapkv/monkeypatch/snapkv_utils.py ("floor");
       antgroup/cakekv@c4675ce, cake/cake_cache.py ("even").
Ours:  what a layer cannot use because the prompt is short goes to the other layers, until nothing
       is left to give (the public rules lose it, or give it once).
"""

from dataclasses import dataclass
from typing import Literal

import torch

from kvtrim.methods.budgets.base import Ledger, ModelWide
from kvtrim.types import Counts, Float, Int, Room, Scores, Tensor


@dataclass(frozen=True)
class LayerShare(ModelWide):
    rounding: Literal["floor", "even"] = "floor"  # what integers leave over: unused, or dealt out
    spread: bool = True  # give what short prompts cannot use to other layers, again and again

    @property
    def holds_less(self) -> str:
        if self.spread:
            return ""
        return "what a layer's share exceeds the prompt by is lost (spread=true deals it out)"

    def open(self) -> Ledger:
        return _Shares(self)


class _Shares(Ledger):
    """What every layer so far has asked for."""

    def __init__(self, budget: LayerShare):
        self.budget = budget
        self.wanted: list[Float[Tensor, " B"]] = []
        self.dealt: list[Int[Tensor, " B"]] = []

    def add(self, room: Room, scores: Scores, wanted: Float[Tensor, " B"]) -> list[Counts]:
        self.wanted.append(wanted.double().cpu())
        asked = torch.stack(self.wanted, dim=1)  # [B, layers so far]
        nothing = (asked.sum(dim=1, keepdim=True) <= 0) | ~asked.isfinite().all(
            dim=1, keepdim=True
        )
        asked = torch.where(nothing, torch.ones_like(asked), asked)
        total = room.layers * room.free
        rows = [self._shares(row, total, room.candidates) for row in asked.tolist()]
        self.dealt.append(torch.full((len(rows),), room.candidates))
        for layer, before in enumerate(self.dealt):
            now = torch.tensor([row[layer] for row in rows]).clamp(max=room.candidates)
            self.dealt[layer] = before.minimum(now)
        return [each[:, None].expand(-1, scores.shape[1]).clone() for each in self.dealt]

    def _shares(self, asked: list[float], total: int, most: int) -> list[int]:
        whole = sum(asked)
        if self.budget.rounding == "even":
            shares = [int(one / whole * total) for one in asked]
            return even_out(shares, total, most, self.budget.spread)
        if self.budget.spread:
            return [int(share) for share in fill(asked, total, most)]
        return [int(one / whole * total) for one in asked]


def fill(asked: list[float], total: int, most: int) -> list[float]:
    """Divide `total` in proportion to what is asked, nobody above `most`, nothing lost."""
    shares, open_ones = [0.0] * len(asked), set(range(len(asked)))
    while open_ones:
        factor = (
            total / sum(asked[i] for i in open_ones) if any(asked[i] for i in open_ones) else 0
        )
        full = {i for i in open_ones if asked[i] * factor > most}
        if not full:
            for i in open_ones:
                shares[i] = asked[i] * factor
            break
        for i in full:
            shares[i] = float(most)
        total -= most * len(full)
        open_ones -= full
    return shares


def even_out(shares: list[int], total: int, most: int, repeat: bool) -> list[int]:
    """CAKE's repair: deal out evenly what is above `most`, then what integers left over."""
    shares = _deal(shares, most)
    spare = total - sum(shares)
    below = [i for i, share in enumerate(shares) if share < most]
    for place, i in enumerate(below):
        shares[i] += spare // len(below) + (place < spare % len(below))
    while repeat and max(shares) > most > min(shares):
        shares = _deal(shares, most)
    return shares


def _deal(shares: list[int], most: int) -> list[int]:
    """Clip to `most`; those below get the clipped out in equal parts, the first ones the rest."""
    excess = sum(max(0, share - most) for share in shares)
    below = [i for i, share in enumerate(shares) if share < most]
    clipped = [min(share, most) for share in shares]
    for place, i in enumerate(below):
        clipped[i] += excess // len(below) + (place < excess % len(below))
    return clipped
