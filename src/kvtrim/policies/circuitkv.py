"""CircuitKV: tokens that random walks visit often stay, whether from the last token or anywhere.

The attention of the last W queries, its maximum over heads, makes a token graph (`markov.py`). A
slot ranks by its visits from the newest token and from everywhere; the better rank counts, one set
for all heads. Costs W attention rows and O(steps * n * W). Leans to early slots.

Paper: none; `v4.3` is the code behind the published rows.
Code:  Js-Hwang1/submission_folder@40956ab and @86bf1a1 (head-*), pyramidkv/pyramidkv_utils.py.
Ours:  the same series without n x n matrices, fp64; ties rank by slot; KV heads are stored; heads
       of different length walk apart; surface="own" averages the queries of a KV head.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from kvtrim import markov, ops
from kvtrim.policies.base import Policy
from kvtrim.ranges import Positive, Range, Some, Tokens
from kvtrim.types import Float, Int, LayerView, Scores, Tensor


@dataclass(frozen=True)
class CircuitKV(Policy):
    window: Some = 8  # how many last queries draw the graph; their slots always stay
    surface: Literal["max", "split", "own"] = "max"  # over heads; "own": each head, no walk
    clearest: Some = 10  # with "split", so many low-entropy heads draw the newest token's graph
    steps: Annotated[int, Range(1, 1000)] = 10  # of the walk
    temperature: Positive = 1.0  # of the graph: below 1 it is sharper
    sinks: Tokens = 4

    def lookback(self) -> int:
        return self.window

    def recent(self, keep: int) -> int:
        return self.window

    def score(self, layer: LayerView) -> Scores:
        """Better of two ranks: queries [B, H, W, D], keys [B, K, S, D] to scores [B, K, S]."""
        heads, lengths = layer.keys.shape[1], ops.lengths(layer)
        weights = ops.attention(layer, last=self.window)
        if self.surface == "own":
            every = lengths.repeat_interleave(weights.shape[1] // heads, dim=1)
            return ops.reduce_group(markov.alone(weights, every, self.sinks), heads, "mean")
        if layer.lengths is None:
            return self._walked(weights, lengths, 1)
        alike = (layer.lengths == layer.lengths[:, :1]).all(dim=1).tolist()
        parts = zip(weights.split(1), lengths.split(1), alike, strict=True)
        return torch.cat([self._walked(w, held, 1 if one else heads) for w, held, one in parts])

    def _walked(
        self, weights: Float[Tensor, "B H W S"], lengths: Int[Tensor, "B K"], walks: int
    ) -> Scores:
        """Scores from one walk for all heads, or one for each."""
        heads = lengths.shape[1]
        weights, held = weights.unflatten(1, (walks, -1)), lengths[:, :walks].flatten()
        best = markov.ranks(self.visits(weights.flatten(0, 1), held), held).amax(dim=1)
        return best.unflatten(0, (-1, walks)).expand(-1, heads, -1)

    def visits(
        self, weights: Float[Tensor, "C H W S"], lengths: Int[Tensor, " C"]
    ) -> Float[Tensor, "C 2 S"]:
        """Expected visits from the newest token and from anywhere."""
        walk = (lengths, self.sinks, self.steps, self.temperature)
        if self.surface == "max":
            return markov.visits(weights.amax(dim=1), *walk)
        return markov.apart(weights, self.clearest, *walk)
