"""ExpectedAttention: what later queries would look at if they were like those of the prompt.

Rule:  before RoPE the prompt's queries, but the first `sinks`, have a mean m and a covariance C.
       With R, the mean of the rotations to the next `future` positions, the queries to come count
       as normal with mean R m and covariance R C R', so that exp(query . key) is expected to be
       exp(s k.R m + s^2 k.R C R' k / 2). That, divided by its sum over slots, averaged over the
       group, plus `eps`, times |v|, is a slot's score.
Paper: Devoto et al. 2025, https://arxiv.org/abs/2510.00636.
Code:  NVIDIA/kvpress@8bb29b9, presses/expected_attention_press.py (by the authors).
Ours:  queries are turned back to position 0 with the model's own rotary embedding instead of being
       projected again; fp32. While generating, the newest `remembered` queries speak.
"""

from dataclasses import dataclass

import torch

from kvtrim.errors import UsageError
from kvtrim.methods.policies import ops
from kvtrim.methods.policies.base import WHOLE, Policy
from kvtrim.methods.ranges import Some, Tokens, Weight
from kvtrim.types import Float, LayerView, Scores, Tensor


@dataclass(frozen=True)
class ExpectedAttention(Policy):
    future: Some = 512  # so many positions behind the last token are expected to be asked from
    covariance: bool = True  # how queries vary counts, not their mean alone
    value_norms: bool = True  # times the length of the slot's value
    eps: Weight = 0.0  # added before that; the authors' leaderboard has 0.01
    remembered: Some = 128  # newest queries that stand for those to come while generating
    sinks: Tokens = 4  # slots that always stay, and queries that are left out

    @property
    def turns(self) -> bool:
        return True

    def lookback(self) -> int:
        return WHOLE

    def remembers(self, settled: bool = True) -> int:
        return self.remembered

    def score(self, layer: LayerView) -> Scores:
        """Queries [B, H, Q, D], keys and values [B, K, S, D] to scores [B, K, S]."""
        most = self.remembered if layer.decoding else layer.tokens
        layer = ops.newest(layer, min(most, layer.tokens))  # a batch may have padded in front
        keys, kv_heads = layer.keys.float(), layer.keys.shape[1]
        turned = self._to_come(layer)
        mean = turned.mean(dim=2)
        packed = mean.unflatten(1, (kv_heads, -1)).transpose(-1, -2)
        logits = (keys @ packed).transpose(-1, -2) * layer.scale  # [B, K, G, S]
        if self.covariance:
            apart = (turned - mean[:, :, None]).unflatten(1, (kv_heads, -1))
            spread = apart.transpose(-1, -2) @ apart / apart.shape[-2]  # [B, K, G, D, D]
            along = ((keys[:, :, None] @ spread) * keys[:, :, None]).sum(dim=-1)
            logits = logits + along * (layer.scale**2 / 2)
        slot = torch.arange(logits.shape[-1], device=keys.device)
        there = slot < ops.lengths(layer)[..., None]
        competing = there & (slot >= min(self.sinks, logits.shape[-1] - 1))
        expected = logits.masked_fill(~competing[:, :, None], -torch.inf).softmax(dim=-1)
        scores = expected.mean(dim=2)
        if self.value_norms:
            scores = (scores + self.eps) * ops.length_of(layer.values.float())
        return scores.masked_fill(~competing, 0)

    def _to_come(self, layer: LayerView) -> Float[Tensor, "B H q D"]:
        """The queries, each at the mean of its rotations to the positions to come."""
        if layer.rotate is None:
            raise UsageError(
                "expected-attention turns queries with the model's rotary embedding, and none was "
                "given; use kvtrim.Cache on a model, or pass select(..., rotate=...)"
            )
        count, device = layer.queries.shape[2], layer.queries.device
        first = min(self.sinks, count - 1) if count == layer.tokens else 0
        queries = layer.queries[:, :, first:].float()
        at = torch.arange(layer.tokens - count + first, layer.tokens, device=device)
        flat = queries.flatten(0, 2)
        back = layer.rotate(flat, -at.repeat(flat.shape[0] // len(at))).view_as(queries)
        width = queries.shape[-1]
        basis = torch.eye(width, device=device).repeat_interleave(self.future, dim=0)
        ahead = torch.arange(layer.tokens, layer.tokens + self.future, device=device)
        mean = layer.rotate(basis, ahead.repeat(width)).view(width, self.future, width).mean(dim=1)
        return back @ mean
