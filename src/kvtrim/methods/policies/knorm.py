"""KNorm: keys of small length tend to attract attention, so the slots with the smallest norm stay.

Rule:  the score of a slot is minus the Euclidean length of its key.
Paper: Devoto et al. 2024, https://arxiv.org/abs/2406.11430, section 3.
Code:  alessiodevoto/l2compress@f93d6ca, cache.py; NVIDIA/kvpress@8bb29b9, presses/knorm_press.py.
Ours:  slots stay in ascending position (the public code leaves them in order of norm).
"""

from dataclasses import dataclass

from kvtrim.methods.policies.base import Policy
from kvtrim.methods.ranges import Tokens
from kvtrim.types import LayerView, Scores


@dataclass(frozen=True)
class KNorm(Policy):
    window: Tokens = 0  # newest slots always kept; the paper reserves none
    sinks: Tokens = 0

    def lookback(self) -> int:
        return 0

    def recent(self, keep: int) -> int:
        return self.window

    def score(self, layer: LayerView) -> Scores:
        """Minus the key norm: keys [B, K, S, D] to scores [B, K, S]."""
        return -layer.keys.float().norm(dim=-1)
