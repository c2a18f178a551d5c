"""DefensiveKV: what any query of the window asked for stays, not what they asked for on average.

Rule:  the attention row of each of the last `window` queries is average-pooled and rescaled to its
       own sum. A slot gets the largest value of any row and any query head of its group, at least
       the mean over slots, times the share that its |v W_O| has. Before that, in each head, the
       slots that hold the first `mass` of the mean attention get the layer's top score or more.
Paper: Feng et al. 2025, https://arxiv.org/abs/2510.13334.
Code:  FFY0/DefensiveKV@9251b95, kvpress/presses/efficient_defensivekv_press.py and
       efficient_layer_defensivekv_press.py (by the authors).
Ours:  the window always stays; `mass` counts what the window pays to itself (the public code takes
       what it pays to the slots before it for that: `own=before`); |v W_O| is divided by the sum
       over slots (there: over the layer's KV heads at each slot, `among=heads`); slots that come
       first rank by their attention (there they tie).
"""

from dataclasses import dataclass
from typing import Literal

import torch

from kvtrim.methods.policies import ops, output
from kvtrim.methods.policies.base import WindowPolicy
from kvtrim.methods.ranges import Kernel, Share, Some, Tokens
from kvtrim.types import Bool, Float, LayerView, Scores, Tensor

_TINY = 1e-30


@dataclass(frozen=True)
class Defensive(WindowPolicy):
    window: Some = 32  # how many last queries are asked; their slots always stay
    kernel: Kernel = 5  # width of the average pooling, odd
    mass: Share = 0.9  # of the mean attention whose slots come first; 0: none do
    own: Literal["window", "before"] = "window"  # what counts towards `mass` from the start: what
    # the window pays to itself, or to as many slots before it
    among: Literal["slots", "heads"] = "slots"  # what |v W_O| is a share of: the sum over the
    # head's slots, or over the layer's heads at that slot
    sinks: Tokens = 0

    def score(self, layer: LayerView) -> Scores:
        """Queries [B, H, W, D], keys and values [B, K, S, D], W_O to scores [B, K, S - W]."""
        kv_heads, weights = layer.keys.shape[1], ops.window_attention(layer, self.window)
        if not weights.shape[-1]:  # heads that hold their window alone
            return weights.new_zeros(*layer.keys.shape[:2], 0)
        there = self._there(layer, weights.shape[-1])
        rows = ops.pool(weights, self.kernel, "avg").unflatten(1, (kv_heads, -1))
        rows = rows.masked_fill(~there[:, :, None, None], 0)
        weights = weights.unflatten(1, (kv_heads, -1))  # [B, K, G, W, N]
        paid = weights.sum(dim=-1, keepdim=True)
        rows = rows * (paid / rows.sum(dim=-1, keepdim=True).clamp(min=_TINY))
        worst = rows.amax(dim=(2, 3))  # [B, K, N]
        least = worst.sum(dim=-1, keepdim=True) / there.sum(dim=-1, keepdim=True).clamp(min=1)
        scores = worst.maximum(least) * self._sizes(layer, there)
        own = (1 - paid[..., 0]) if self.own == "window" else self._paid_before(layer, weights)
        own = own.flatten(1).mean(dim=-1)  # of each prompt, over heads and queries
        mean = weights.mean(dim=(2, 3))
        shares = mean / mean.sum(dim=-1, keepdim=True).clamp(min=_TINY)
        first = self._first(shares, own, layer.keep) & there
        return torch.where(first, scores.amax(dim=(1, 2), keepdim=True) * (1 + shares), scores)

    def _paid_before(
        self, layer: LayerView, weights: Float[Tensor, "B K G W N"]
    ) -> Float[Tensor, "B K G W"]:
        """What each query pays to as many slots before the window as the window has."""
        first = (ops.lengths(layer) - 2 * self.window)[:, :, None, None, None]
        slot = torch.arange(weights.shape[-1], device=weights.device)
        return weights.masked_fill(slot < first, 0).sum(dim=-1)

    def _there(self, layer: LayerView, slots: int) -> Bool[Tensor, "B K N"]:
        """Which slots lie before a head's window."""
        before = (ops.lengths(layer) - self.window)[..., None]
        return torch.arange(slots, device=layer.keys.device) < before

    def _sizes(self, layer: LayerView, there: Bool[Tensor, "B K N"]) -> Scores:
        """What share of |v W_O| each slot has; |.| is the L1 norm, averaged over the group."""
        sizes = output.projected_norms_l1(layer, there.shape[-1]).masked_fill(~there, 0)
        over = -1 if self.among == "slots" else 1
        return sizes / sizes.sum(dim=over, keepdim=True).clamp(min=_TINY)

    def _first(self, shares: Scores, own: Float[Tensor, " B"], keep: int) -> Bool[Tensor, "B K N"]:
        """The slots looked at most, up to `mass` of what a head looks at; its room at most."""
        ordered, order = shares.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) < (self.mass - own)[:, None, None]
        place = torch.arange(shares.shape[-1], device=shares.device)
        chosen = before & (place < max(0, keep - self.window))
        return torch.zeros_like(chosen).scatter(-1, order, chosen)
