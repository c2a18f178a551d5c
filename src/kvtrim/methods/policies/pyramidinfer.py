"""PyramidInfer: a token matters as much as the newest tokens attend to it, later ones more.

Rule:  the mean over all query heads of the attention that a slot receives from the queries at
       hand, weighted from 1 for the oldest of them to `newest_weight` for the newest.
Paper: Yang et al. 2024, https://arxiv.org/abs/2405.12532, section 3.
Code:  mutonix/pyramidinfer@61ac641, models/modeling_llama_pyramidinfer.py.
Ours:  `propagation=cascade` chooses by the same rule in the prompt, and has a weight of its own.
       While an answer is written in blocks (`region=blocks`) the newest token and `newest` before
       it are asked, whose attention is worked out anew: the code stores their rows. Everywhere
       else the newest query alone is asked.
"""

from dataclasses import dataclass

import torch

from kvtrim.methods.policies import ops
from kvtrim.methods.policies.base import Policy
from kvtrim.methods.ranges import Positive
from kvtrim.types import Float, LayerView, Scores, Tensor


@dataclass(frozen=True)
class PyramidInfer(Policy):
    newest_weight: Positive = 1.2  # of the newest query, relative to the oldest one asked

    def lookback(self) -> int:
        return 1

    def score(self, layer: LayerView) -> Scores:
        """Weighted attention of all queries at hand, the same for every head: [B, K, S]."""
        mean = votes(layer, self.newest_weight).mean(dim=1, keepdim=True)
        return mean.expand(layer.keys.shape[:3])


def votes(layer: LayerView, weight: float) -> Float[Tensor, "B H S"]:
    """Attention that each slot received, later queries counting more, up to `weight`."""
    queries = layer.queries.shape[2]
    rising = torch.linspace(1, weight, queries, device=layer.keys.device)
    return ops.column_sums(layer, rising.expand(layer.keys.shape[0], -1))
