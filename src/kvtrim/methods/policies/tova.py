"""TOVA: after each step the slot that the newest token attends to least is dropped.

Rule:  the score of a slot is the softmax attention that the newest token gives it, averaged over
       all query heads of the layer. Nothing is accumulated and nothing protected, not even that
       token itself; all KV heads of a layer keep the same positions.
Paper: Oren et al. 2024, https://arxiv.org/abs/2401.06104, section 3.2.
Code:  schwartz-lab-NLP/TOVA@275cf5f, src/tova_cache.py; NVIDIA/kvpress@8bb29b9, tova_press.py.
Ours:  a prompt is read with full attention and cut once at its end, as the released code does.
"""

from dataclasses import dataclass

from kvtrim.methods.policies import ops
from kvtrim.methods.policies.base import Policy
from kvtrim.methods.ranges import Tokens
from kvtrim.types import LayerView, Scores


@dataclass(frozen=True)
class Tova(Policy):
    protect_last: Tokens = 0  # newest slots that never compete; kvpress protects one
    per_head: bool = False  # KV heads choose alone; the released cache keeps one set per layer
    sinks: Tokens = 0

    def lookback(self) -> int:
        return 1

    def recent(self, keep: int) -> int:
        return self.protect_last

    def score(self, layer: LayerView) -> Scores:
        """The newest query's attention: queries [B, H, 1, D], keys [B, K, S, D] to [B, K, S]."""
        kv_heads = layer.keys.shape[1]
        weights = ops.attention(layer, last=1)[:, :, 0]  # [B, H, S]
        if self.per_head:
            return ops.reduce_group(weights, kv_heads, "mean")
        return weights.mean(dim=1, keepdim=True).expand(-1, kv_heads, -1)
