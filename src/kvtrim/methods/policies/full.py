"""Full: nothing is evicted. The reference for answers, seconds and bytes of every other method.

Rule:  every slot scores 0; the budget of this method never evicts.
Paper: none, plain causal attention.
"""

from dataclasses import dataclass

import torch

from kvtrim.methods.policies.base import Policy
from kvtrim.types import LayerView, Scores


@dataclass(frozen=True)
class Full(Policy):
    def lookback(self) -> int:
        return 0

    def score(self, layer: LayerView) -> Scores:
        """All slots alike; the budget that goes with this rule never evicts."""
        return torch.zeros(layer.keys.shape[:3], device=layer.keys.device)
