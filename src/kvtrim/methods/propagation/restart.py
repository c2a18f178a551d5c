"""Restart: an early layer filters the prompt, and the model starts again on what it chose.

The first layers read the whole prompt without storing anything. At the filter layer the raw
logits of the last token over all keys are added up over the query heads and smoothed; the best
tokens, in their order, are then the whole prompt: their positions are closed up, and generation
goes on behind them.

Paper: Shi et al. 2024 (GemFilter), https://arxiv.org/abs/2409.17422, section 3.
Code:  SalesforceAIResearch/GemFilter@5f79b1a, my_baseline/GemFilter/gem_filter_utils.py.
       Nothing is protected, the last token neither: with `recent` (or `sinks`) it is.
Ours:  the filter layer stops after its queries and keys; no layer above it runs twice.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch.nn.functional as F

from kvtrim.methods.budgets.base import everyone
from kvtrim.methods.policies.base import Policy
from kvtrim.methods.propagation import layers as at
from kvtrim.methods.propagation.base import Propagation
from kvtrim.methods.ranges import Amount, Kernel, Tokens
from kvtrim.methods.selection import select
from kvtrim.types import Int, LayerView, Target, Tensor


@dataclass(frozen=True)
class Restart(Propagation):
    layer: Tokens | None = None  # the filter layer; none: published for this model, or the middle
    tokens: Amount | None = None  # tokens of the second reading; none: as many as `keep`
    kernel: Kernel = 5  # width of the averaging over neighbouring tokens, odd
    pad: Literal["zero", "edge"] = "zero"  # beyond the ends: zeros, as published, or the end
    sinks: Tokens = 0  # first tokens that are read again whatever their score
    recent: Tokens = 0  # last tokens, likewise
    restarts: ClassVar[bool] = True

    @property
    def holds_more(self) -> str:
        return "" if self.tokens is None else f"tokens={self.tokens} are read again, not keep"

    @property
    def holds_less(self) -> str:
        return self.holds_more

    def fitted(self, target: Target) -> "Restart":
        return replace(self, layer=at.layer_for(self.layer, target, at.FILTER, target.layers - 1))

    def chooses(self, layer: int, layers: int) -> bool:
        return layer == at.middle(self.layer, layers)

    def choose(self, view: LayerView, policy: Policy, prompt: int) -> Int[Tensor, "B T"] | None:
        slots = view.keys.shape[2]
        wanted = view.keep if self.tokens is None else at.amount(self.tokens, slots)
        if wanted >= slots:
            return None
        last = view.queries[:, :, -1:].float().unflatten(1, (view.keys.shape[1], -1))
        logits = (last @ view.keys.float().transpose(-1, -2)[:, :, None]).sum(
            dim=(1, 2)
        )  # [B,1,S]
        sides = (self.kernel // 2, self.kernel // 2)
        padded = F.pad(logits, sides, mode="constant" if self.pad == "zero" else "replicate")
        scores = F.avg_pool1d(padded, self.kernel, stride=1)
        sinks, recent = min(self.sinks, wanted), min(self.recent, wanted)
        counts = everyone(max(0, wanted - sinks - recent), scores)
        return select(scores, counts, slots, sinks=sinks, recent=recent).slots[:, 0]
