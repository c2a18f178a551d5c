"""KeyDiff: keys that point away from the head's average key stay; the alike stand for each other.

score = minus the cosine between a key and the mean of all unit keys. Costs one pass over the keys
(S * D, in place of all pairs at S^2 * D) and needs neither queries nor attention, so it also runs
at every step: preset `bounded` holds the cache at its budget while generating.

Paper: https://arxiv.org/abs/2504.15364.
Code:  NVIDIA/kvpress@8bb29b9, kvpress/presses/keydiff_press.py.
Ours:  keys as cached, after RoPE, in fp32; a key without length scores 0. Nothing recent is
       reserved, `window` can.
"""

from dataclasses import dataclass

import torch.nn.functional as F

from kvtrim.methods.policies import ops
from kvtrim.methods.policies.base import Policy
from kvtrim.methods.ranges import Tokens
from kvtrim.types import LayerView, Scores


@dataclass(frozen=True)
class KeyDiff(Policy):
    window: Tokens = 0  # newest slots always kept; neither paper nor code reserves any
    sinks: Tokens = 0

    def lookback(self) -> int:
        return 0

    def recent(self, keep: int) -> int:
        return self.window

    def score(self, layer: LayerView) -> Scores:
        """Minus the cosine to the head's anchor: keys [B, K, S, D] to scores [B, K, S]."""
        units = F.normalize(ops.clear_window(layer, layer.keys).float(), dim=-1)
        anchor = F.normalize(units.sum(dim=-2, keepdim=True), dim=-1)
        return -(units * anchor).sum(dim=-1)
