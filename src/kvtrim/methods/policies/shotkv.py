"""ShotKV: an in-context example (shot) stays or goes as a whole; the answer is trimmed by itself.

Prompt: acc[t] = attention that token t receives from later tokens of the prompt, added over all
query heads; a shot's score is the mean of acc over its tokens (unit `shot`), and the best shots
stay while they fit beside the fixed text. While generating, the prompt is left alone, and of the
generated tokens those stay that the newest query attends to most (region of the schedule).

For many-shot prompts. Costs the attention of the prompt once more (`last_w`: of its last queries
only). observers="all", the words of the paper, favours early shots, which more queries follow.
With one prefill over everything the first new token still saw every shot: ask for long answers,
or compress the shots before the question (question-agnostic).

Paper: Liu et al. 2025, https://arxiv.org/abs/2502.01941 v4, section 5.1, eq. 2-9, Algorithm 1.
Code:  none is public.
Ours:  each layer ranks by itself (the body of v4), not all together; the budget is a share of the
       prompt, and the same share of what was generated so far.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from kvtrim.methods.policies import ops
from kvtrim.methods.policies.base import Policy
from kvtrim.methods.ranges import Some
from kvtrim.types import Float, LayerView, Scores, Tensor


@dataclass(frozen=True)
class ShotKV(Policy):
    observers: Literal["all", "last_w", "question"] = "all"  # whose attention counts
    window: Some = 32  # W of observers="last_w"
    self_attention: bool = False  # what a token of the prompt pays to itself counts too
    accumulate: bool = False  # rank generated tokens by all attention so far, as H2O does
    carries: ClassVar[bool] = True

    def lookback(self) -> int:
        return self.window if self.observers == "last_w" else 1

    def observes(self, decoding: bool) -> bool:
        return self.accumulate if decoding else self.observers != "last_w"

    def observe(self, layer: LayerView) -> Float[Tensor, "B K S"]:
        """Add this pass's attention: queries [B, H, Q, D], keys [B, K, S, D] to sums [B, K, S]."""
        asked = self.observers == "question" and not layer.decoding
        of = ops.queries_in(layer, "question") if asked else None
        sums = ops.column_sums(layer, of, own=self.self_attention or layer.decoding)
        sums = ops.reduce_group(sums, layer.keys.shape[1], "sum")
        return sums if layer.carried is None else layer.carried + sums

    def score(self, layer: LayerView) -> Scores:
        """Attention received, summed over all heads and given to each of them: [B, K, S]."""
        votes = layer.carried
        if not self.observes(layer.decoding):
            last = 1 if layer.decoding else min(self.window, layer.keys.shape[2])
            layer = ops.newest(layer, last)
            votes = ops.column_sums(layer, own=self.self_attention or layer.decoding)
        if votes is None:
            raise TypeError("ShotKV scores what it observed; call observe first")
        return votes.sum(dim=1, keepdim=True).expand(layer.keys.shape[:3])
