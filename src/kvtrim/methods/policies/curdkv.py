"""CurDKV: a token matters as much as its key and value rows carry energy, |k P|^2 * |v P|^2.

P projects to `project` random numbers (none: plain row norms). Costs one pass over keys and
values and needs no queries, so a context can be cut before its question is known. `exact` takes
true leverage from an SVD instead, at about S * D^2. In ada-curdkv the heads of a layer compete:
the largest shares win, each head keeps its own best first.

Paper: https://arxiv.org/abs/2509.15038, section 3.2, Algorithm 1, Appendix C.3.
Code:  codetalker7/kvpress, branch curpress; NVIDIA/kvpress@8bb29b9, presses/cur_press.py.
Ours:  original rows stay (Algorithm 1 gathers projected ones); fp32; P follows (seed, layer).
"""

from dataclasses import dataclass
from typing import Literal

import torch

from kvtrim.methods.policies import ops
from kvtrim.methods.policies.base import Policy
from kvtrim.methods.ranges import Seed, Some, Tokens
from kvtrim.types import Float, Int, LayerView, Scores, Tensor

# How much each row of a head's keys or values weighs in them, and its share among neighbours.

Padding = Literal["front", "tail"]

_LEAST = 1e-12  # a run of zeros has shares of zero, not of nothing
_ALONE = 1e-5  # a leverage this near to 1 is 1


def gaussian(seed: int, heads: int, width: int, project: int) -> Float[Tensor, "K X R"]:
    """A random projection per head that keeps squared norms on average: entries N(0, 1 / R).

    Drawn on the CPU, so that a seed gives the same numbers on every device.
    """
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(heads, width, project, generator=draw) / project**0.5


def energies(
    rows: Float[Tensor, "B K S D"], sketch: Float[Tensor, "*heads X R"] | None = None
) -> Float[Tensor, "B K S"]:
    """Squared norm of each row, or of its projection: `sketch` [X, R] or [K, X, R] with X >= D."""
    rows = rows.float()
    if sketch is not None:
        rows = rows @ sketch[..., : rows.shape[-1], :].to(rows.device)
    return rows.square().sum(dim=-1)


def leverages(rows: Float[Tensor, "B K S D"], rank: int | None = None) -> Float[Tensor, "B K S"]:
    """Squared norm of each row of the left singular vectors, all of them or the first `rank`.

    A head's leverages sum to its rank. Directions that only rounding gives do not count. A row
    that alone spans a direction has exactly 1, so that rounding does not rank such rows.
    """
    left, strengths, _ = torch.linalg.svd(rows.float(), full_matrices=False)
    least = torch.finfo(torch.float32).eps * max(rows.shape[-2:])
    real = strengths > least * strengths[..., :1]
    if rank is not None:
        real[..., rank:] = False
    found = (left.square() * real[..., None, :]).sum(dim=-1)
    return found.masked_fill(found > 1 - _ALONE, 1)


def shares(weights: Float[Tensor, "B K S"]) -> Float[Tensor, "B K S"]:
    """Each weight over its head's sum."""
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def local_shares(
    weights: Float[Tensor, "B K S"], lengths: Int[Tensor, "B K"], width: int, padding: Padding
) -> Float[Tensor, "B K S"]:
    """Each weight over the sum of its run of `width` slots; the run at the `padding` is shorter.

    Slots behind a head's length must weigh nothing.
    """
    slots = weights.shape[-1]
    shift = (-lengths % width if padding == "front" else torch.zeros_like(lengths))[..., None]
    places = torch.arange(slots + -slots % width + width, device=weights.device)
    source = places - shift  # the slot at each place of the padded row
    outside = (source < 0) | (source >= slots)
    padded = weights.gather(-1, source.clamp(0, slots - 1)).masked_fill(outside, 0)
    runs = padded.unflatten(-1, (-1, width))
    local = runs / runs.sum(dim=-1, keepdim=True).clamp(min=_LEAST)
    return local.flatten(-2).gather(-1, places[:slots] + shift)


@dataclass(frozen=True)
class CurDKV(Policy):
    project: Some | None = 20  # numbers per row after the projection; none: no projection
    leverage: Literal["kv", "key", "value", "mean"] = "kv"  # their product, one, or their mean
    local_window: Some | None = None  # first weigh each row inside its run of so many slots
    padding: Padding = "front"  # the end with the shorter run
    exact: bool = False  # true leverage instead of energy; nothing is projected
    rank: Some | None = None  # of the basis of `exact`; none: the whole space
    sinks: Tokens = 4
    seed: Seed = 0

    def lookback(self) -> int:
        return 0

    def score(self, layer: LayerView) -> Scores:
        """Shares of each head's energy: keys [B, K, S, D], values [B, K, S, E] to [B, K, S]."""
        if self.exact or self.project is None:
            return self.shares(layer, None)
        width = max(layer.keys.shape[-1], layer.values.shape[-1])
        seed = self.seed * 1_000_003 + layer.index
        return self.shares(layer, gaussian(seed, layer.keys.shape[1], width, self.project))

    def shares(self, layer: LayerView, sketch: Float[Tensor, "*heads X R"] | None) -> Scores:
        """The same under a given projection, one per KV head or one for all."""
        key, value = (self._weights(layer, x, sketch) for x in (layer.keys, layer.values))
        mixed = {"kv": key * value, "key": key, "value": value, "mean": (key + value) / 2}
        return shares(mixed[self.leverage])

    def _weights(self, layer: LayerView, rows: Tensor, sketch: Tensor | None) -> Scores:
        rows = ops.clear_window(layer, rows)
        raw = leverages(rows, self.rank) if self.exact else energies(rows, sketch)
        if self.local_window is None:
            return raw
        return local_shares(raw, ops.lengths(layer), self.local_window, self.padding)
