"""LaProx: an entry matters as much as it adds to the window's projected attention output.

The window's output is a sum over heads and tokens of (attention column) x (value through W_O), and
the product of the two norms bounds what leaving one out costs. Scores are divided by their sum
over the layer, which makes layers comparable, so that one budget can serve the whole model.

Paper: https://arxiv.org/abs/2605.07234, Algorithms 1 and 2, Appendix A; no official code is known.
Ours:  what the text leaves open is a parameter: how query heads are joined, what is pooled, how
       layers are made comparable. Norms behind W_O come from a QR factor per head, once per model.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from kvtrim import ops
from kvtrim.policies.base import Policy, require_odd
from kvtrim.types import Float, LayerView, Scores, Tensor


@dataclass(frozen=True)
class LaProx(Policy):
    window: int = 32  # how many last queries are asked; their slots always stay
    kernel: int = 7  # width of the average pooling, odd; 1 is none
    pool_on: Literal["attn", "score"] = "attn"  # pool the attention norms, or the whole score
    gqa: Literal["prod", "attn", "rss", "block"] = "prod"  # sum of products (an upper bound);
    # of the mean attention; root of squares; the exact error of leaving one entry out
    norm: Literal["sum", "none", "out"] = "sum"  # divide by the layer's sum, nothing, |output|
    sinks: int = 0

    def __post_init__(self) -> None:
        require_odd("kernel", self.kernel)

    def lookback(self) -> int:
        return self.window

    def recent(self, keep: int) -> int:
        return self.window

    def score(self, layer: LayerView) -> Scores:
        """Queries [B, H, W, D], keys and values [B, K, S, D], W_O to scores [B, K, S - W]."""
        weights = ops.attention(layer, last=self.window)  # [B, H, W, S]
        candidates = layer.keys.shape[2] - self.window
        scores = self._join(layer, weights[..., :candidates])
        if self.pool_on == "score" or self.gqa == "block":
            scores = ops.pool(scores, self.kernel, "avg")
        if self.norm == "sum":
            # slots behind a head's length got no attention, so they add nothing
            return scores / scores.sum(dim=(1, 2), keepdim=True).clamp(min=1e-30)
        return scores / _output_norm(layer, weights) if self.norm == "out" else scores

    def _join(self, layer: LayerView, weights: Float[Tensor, "B H W N"]) -> Scores:
        kv_heads, candidates = layer.keys.shape[1], weights.shape[-1]
        if self.gqa == "block":
            return ops.group_output_norms(layer, weights)
        value = ops.projected_norms(layer)[..., :candidates]  # [B, H, N]
        if self.gqa == "attn":
            grouped = weights.unflatten(1, (kv_heads, -1)).mean(dim=2).norm(dim=-2)
            return self._pooled(grouped) * ops.reduce_group(value, kv_heads, "mean")
        product = self._pooled(weights.norm(dim=-2)) * value
        if self.gqa == "rss":
            return ops.reduce_group(product**2, kv_heads, "sum").sqrt()
        return ops.reduce_group(product, kv_heads, "sum")

    def _pooled(self, norms: Float[Tensor, "B X N"]) -> Float[Tensor, "B X N"]:
        return ops.pool(norms, self.kernel, "avg") if self.pool_on == "attn" else norms


def _output_norm(layer: LayerView, weights: Float[Tensor, "B H W S"]) -> Float[Tensor, "B 1 1"]:
    """Frobenius norm of the window's projected attention output."""
    values = layer.values.float().repeat_interleave(weights.shape[1] // layer.keys.shape[1], 1)
    mixed = torch.einsum("bhws,bhse,hem->bwm", weights, values, ops.output(layer).float())
    return mixed.norm(dim=(1, 2))[:, None, None]
