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

from kvtrim import energy, ops
from kvtrim.policies.base import Policy
from kvtrim.ranges import Seed, Some, Tokens
from kvtrim.types import Float, LayerView, Scores, Tensor


@dataclass(frozen=True)
class CurDKV(Policy):
    project: Some | None = 20  # numbers per row after the projection; none: no projection
    leverage: Literal["kv", "key", "value", "mean"] = "kv"  # their product, one, or their mean
    local_window: Some | None = None  # first weigh each row inside its run of so many slots
    padding: energy.Padding = "front"  # the end with the shorter run
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
        return self.shares(layer, energy.gaussian(seed, layer.keys.shape[1], width, self.project))

    def shares(self, layer: LayerView, sketch: Float[Tensor, "*heads X R"] | None) -> Scores:
        """The same under a given projection, one per KV head or one for all."""
        key, value = (self._weights(layer, x, sketch) for x in (layer.keys, layer.values))
        mixed = {"kv": key * value, "key": key, "value": value, "mean": (key + value) / 2}
        return energy.shares(mixed[self.leverage])

    def _weights(self, layer: LayerView, rows: Tensor, sketch: Tensor | None) -> Scores:
        rows = ops.cleared(layer, rows)
        raw = energy.leverages(rows, self.rank) if self.exact else energy.energies(rows, sketch)
        if self.local_window is None:
            return raw
        return energy.local_shares(raw, ops.lengths(layer), self.local_window, self.padding)
