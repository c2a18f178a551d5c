"""CAKE: mean attention of the window plus how much it varies between its queries.

Rule:  mean + gamma x variance of the last `window` queries' attention, pooled over `kernel`
       neighbours, averaged over the group. Layers whose window attention is dispersed (entropy)
       and shifting (variance) get more of the budget. While generating the newest query ranks.
Paper: https://arxiv.org/abs/2503.12491, section 4.
Code:  antgroup/cakekv@c4675ce, cake/cake_cache.py and cake/utils.py.
Ours:  compresses as soon as the prompt exceeds the budget (the public code waits for a window
       more); slots stay in their order, so that pooling smooths over true neighbours.
"""

from dataclasses import dataclass
from typing import Annotated

import torch

from kvtrim.methods.policies import ops
from kvtrim.methods.policies.base import WindowPolicy
from kvtrim.methods.ranges import Kernel, Positive, Range, Tokens, Weight
from kvtrim.types import Float, LayerView, Scores, Tensor

TAUS = {
    "llama-3.1-8b-1024": {"tau1": 1.6, "tau2": 0.4},
    "llama-3.1-8b-128": {"tau1": 1.6, "tau2": 0.6},
    "mistral-7b-v0.3-1024": {"tau1": 0.8, "tau2": 0.5},
    "mistral-7b-v0.3-128": {"tau1": 1.0, "tau2": 0.8},
    "qwen2.5-7b-1024": {"tau1": 1.5, "tau2": 0.6},
    "qwen2.5-7b-128": {"tau1": 0.4, "tau2": 0.6},
    "llama-2-7b-1024": {"tau1": 1.9, "tau2": 1.8},
    "llama-2-7b-128": {"tau1": 0.9, "tau2": 2.3},
    "llama-2-13b-1024": {"tau1": 0.5, "tau2": 0.4},
    "llama-2-13b-128": {"tau1": 1.8, "tau2": 2.0},
}
"""tau1 and tau2 that the authors chose for a model and a budget."""


@dataclass(frozen=True)
class Cake(WindowPolicy):
    window: Annotated[int, Range(2)] = 32  # how many last queries are asked; their slots
    # always stay
    # a variance
    kernel: Kernel = 5  # width of the average pooling, odd
    gamma: Weight = 200.0  # weight of the variance
    tau1: Positive = 1.0  # the entropy counts to the power of 1 / tau1
    tau2: Positive = 1.0  # the variance counts to the power of 1 / tau2
    sinks: Tokens = 0

    def remembers(self, settled: bool = True) -> int:
        return 1 if settled else self.window  # the newest ranks; layers compete by the window

    def score(self, layer: LayerView) -> Scores:
        """Queries [B, H, W, D] and keys [B, K, S, D] to scores [B, K, S - W]."""
        rows = 1 if layer.decoding else self.window
        weights = ops.window_attention(layer, self.window, last=rows)
        votes = weights.mean(dim=-2)
        if not layer.decoding:
            votes = votes + self.gamma * ops.variance_of(weights)
        return ops.reduce_group(ops.pool(votes, self.kernel, "avg"), layer.keys.shape[1], "mean")

    def preference(self, layer: LayerView, scores: Scores) -> Float[Tensor, " B"]:
        """Entropy^(1 / tau1) x variance^(1 / tau2) of the window's attention to the candidates."""
        weights = ops.window_attention(layer, self.window)
        entropy = -(weights * torch.log(weights + 1e-10)).sum(dim=(1, 2, 3))
        variance = ops.variance_of(weights).sum(dim=(1, 2))
        return entropy.double() ** (1 / self.tau1) * variance.double() ** (1 / self.tau2)
