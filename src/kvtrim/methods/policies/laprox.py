"""LaProx: an entry matters as much as it adds to the window's projected attention output.

Rule:  |attention column| x |value through W_O|, which bounds what leaving an entry out costs,
       summed over the group and divided by the layer's sum, to be comparable between layers.
Paper: https://arxiv.org/abs/2605.07234, Algorithms 1 and 2, Appendix A; no official code.
Ours:  what the text leaves open is a parameter. Norms behind W_O come from a QR factor per head.
"""

from dataclasses import dataclass
from typing import Literal

from kvtrim.methods.policies import ops, output
from kvtrim.methods.policies.base import WindowPolicy
from kvtrim.methods.ranges import Kernel, Some, Tokens
from kvtrim.types import Float, LayerView, Scores, Tensor


@dataclass(frozen=True)
class LaProx(WindowPolicy):
    window: Some = 32  # how many last queries are asked; their slots always stay
    kernel: Kernel = 7  # width of the average pooling, odd
    pool_on: Literal["attn", "score"] = "attn"  # pool the attention norms, or the whole score
    gqa: Literal["prod", "attn", "rss", "block"] = "prod"  # how a group's query heads are joined
    norm: Literal["sum", "none", "out", "resid"] = "sum"  # divide by the layer's sum, nothing,
    # |the window's output|, or |what the layer receives for the window| (Frobenius)
    sinks: Tokens = 0

    @property
    def reads_hidden(self) -> bool:
        return self.norm == "resid"

    def score(self, layer: LayerView) -> Scores:
        """Queries [B, H, W, D], keys and values [B, K, S, D], W_O to scores [B, K, S - W]."""
        scores = self._join(layer, ops.window_attention(layer, self.window))
        if self.pool_on == "score" or self.gqa == "block":
            scores = ops.pool(scores, self.kernel, "avg")
        if self.norm == "sum":
            return scores / scores.sum(dim=(1, 2), keepdim=True).clamp(min=1e-30)
        if self.norm == "out":
            return scores / output.output_norm(layer, self.window)
        if self.norm == "resid":
            received = ops.hidden(layer)[:, -self.window :].float()
            return scores / received.norm(dim=(1, 2))[:, None, None]
        return scores

    def _join(self, layer: LayerView, weights: Float[Tensor, "B H W N"]) -> Scores:
        kv_heads, candidates = layer.keys.shape[1], weights.shape[-1]
        if self.gqa == "block":
            return output.group_output_norms(layer, weights)
        value = output.projected_norms(layer)[..., :candidates]  # [B, H, N]
        if self.gqa == "attn":
            grouped = weights.unflatten(1, (kv_heads, -1)).mean(dim=2).norm(dim=-2)
            return self._pool(grouped) * ops.reduce_group(value, kv_heads, "mean")
        product, power = self._pool(weights.norm(dim=-2)) * value, 2 if self.gqa == "rss" else 1
        return ops.reduce_group(product**power, kv_heads, "sum") ** (1 / power)

    def _pool(self, norms: Float[Tensor, "B X N"]) -> Float[Tensor, "B X N"]:
        return ops.pool(norms, self.kernel, "avg") if self.pool_on == "attn" else norms
