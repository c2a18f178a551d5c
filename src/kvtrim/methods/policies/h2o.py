"""H2O: a token is a heavy hitter when all queries so far attended to it a lot.

Rule:  the score of a slot is the softmax attention it received from every query since it was read,
       added up; half of the budget goes to the highest, half to the newest. `upstream-ratio` takes
       keep=20% (a tenth of the prompt each), `upstream-stream` keep=2048 (48 heavy, 2000 recent).
Paper: Zhang et al. 2023, https://arxiv.org/abs/2306.14048, section 4.
Code:  FMInference/H2O@ac75c2a, h2o_hf/utils_real_drop/modify_llama.py ("upstream-stream") and
       utils_hh/modify_llama.py ("upstream-ratio"); prefill-only ports in
       Zefan-Cai/KVCache-Factory@c97f9d7 and dongwonjo/FastKV@b978769; kvpress ObservedAttention.
Ours:  true causal column sums, in blocks of queries (the ports lack the causal mask or need an
       n x n matrix); query heads are averaged per KV group. The ratio code only masks, and hides
       the token that leaves the recent part for one step; here it competes at once.
"""

from dataclasses import dataclass
from typing import ClassVar

from kvtrim.errors import UsageError
from kvtrim.methods.policies import ops
from kvtrim.methods.policies.base import Policy
from kvtrim.methods.ranges import Some, Tokens
from kvtrim.types import Float, LayerView, Scores, Tensor


@dataclass(frozen=True)
class H2O(Policy):
    window: Tokens | None = None  # newest slots always kept; none is half of the budget
    heavy: Some | None = None  # the other way round: heavy hitters kept, the rest are the newest
    group: ops.Reduce = "mean"  # over the query heads of one KV head
    per_query: bool = False  # divide by the number of queries that saw the token (kvpress)
    sinks: Tokens = 0
    carries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heavy is not None and self.window is not None:
            raise UsageError(f"heavy={self.heavy}, window={self.window}: give one of them")

    def lookback(self) -> int:
        return 0  # `observe` has seen every query already

    def recent(self, keep: int) -> int:
        if self.heavy is not None:
            return max(0, keep - self.sinks - self.heavy)
        return keep // 2 if self.window is None else self.window

    def observe(self, layer: LayerView) -> Float[Tensor, "B K S"]:
        """Add this pass's attention: queries [B, H, Q, D], keys [B, K, S, D] to sums [B, K, S]."""
        sums = ops.reduce_group(ops.column_sums(layer), layer.keys.shape[1], self.group)
        return sums if layer.carried is None else layer.carried + sums

    def score(self, layer: LayerView) -> Scores:
        """Attention received so far, [B, K, S]; per query that could give it, if asked."""
        received = layer.carried
        if received is None:
            raise TypeError("H2O scores what it observed; call observe first")
        if not self.per_query:
            return received
        seen_by = layer.positions.amax(dim=-1, keepdim=True) + 1 - layer.positions
        return received / seen_by
