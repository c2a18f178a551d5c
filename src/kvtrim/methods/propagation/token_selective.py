"""Token-selective: after one layer only chosen tokens go on to the layers above.

Up to and including the layer chosen for it every layer reads the whole prompt. There the method's
scores are added up over the KV heads; the best tokens and the protected ones go on, at their
original positions. Layers above read T tokens instead of n, which saves their time; what each
layer then keeps in the cache is the budget's business.

    T = tokens, or int(tokens * n) if it is a share

Paper: Jo et al. 2025 (FastKV), https://arxiv.org/abs/2502.01068, section 4.
Code:  dongwonjo/FastKV@b978769, baselines/fastkv/ (shares); @5322e1a, baseline/fastkv/ (numbers).
Ours:  any policy may score; padding and batches; a prompt that fits into the budget goes on whole.
"""

from dataclasses import dataclass, replace

from kvtrim.errors import UsageError
from kvtrim.methods.budgets.base import everyone
from kvtrim.methods.policies import ops
from kvtrim.methods.policies.base import Policy, checked_score
from kvtrim.methods.propagation import layers as at
from kvtrim.methods.propagation.base import Propagation
from kvtrim.methods.ranges import Amount, Tokens
from kvtrim.methods.selection import select
from kvtrim.types import Int, LayerView, Target, Tensor


@dataclass(frozen=True)
class TokenSelective(Propagation):
    layer: Tokens | None = None  # the last that reads all of it; none: measured, or the middle
    tokens: Amount = 0.2  # how many go on: a number, or a share of the prompt
    scorer: Policy | None = None  # scores for this choice alone; none: the method's own

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scorer is not None and not self.scorer.at_sight:
            raise UsageError(
                f"scorer={type(self.scorer).__name__} scores by more than a layer's own queries "
                "and entries; use one that scores a layer at sight, such as snapkv"
            )

    @property
    def holds_less(self) -> str:
        text = f"layers above the one that chooses read only the tokens={self.tokens} of the"
        return f"{text} prompt that went on, and so hold no more"

    def fitted(self, target: Target) -> "TokenSelective":
        return replace(self, layer=at.layer_for(self.layer, target, at.TSP, target.layers - 2))

    def chooses(self, layer: int, layers: int) -> bool:
        return layer == at.middle(self.layer, layers) < layers - 1

    def choose(self, view: LayerView, policy: Policy, prompt: int) -> Int[Tensor, "B T"] | None:
        scorer, slots = self.scorer or policy, view.keys.shape[2]
        recent, sinks = max(1, scorer.recent(view.keep)), scorer.sinks  # the last token goes on
        count = max(1, at.amount(self.tokens, slots) - recent - sinks)
        if recent + sinks + count >= slots:
            return None
        scores = checked_score(scorer, ops.newest(view, scorer.lookback())).sum(
            dim=1, keepdim=True
        )
        return select(scores, everyone(count, scores), slots, sinks=sinks, recent=recent).slots[
            :, 0
        ]
