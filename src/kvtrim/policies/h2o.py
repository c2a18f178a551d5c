"""H2O: a token is a heavy hitter when all queries so far attended to it a lot.

Paper: Zhang et al. 2023, https://arxiv.org/abs/2306.14048, section 4.
Code:  FMInference/H2O@ac75c2a, h2o_hf/utils_real_drop/modify_llama.py; prefill-only ports in
       Zefan-Cai/KVCache-Factory@c97f9d7 and dongwonjo/FastKV@b978769; kvpress ObservedAttention.
Ours:  true causal column sums, in blocks of queries (the ports lack the causal mask or need an
       n x n matrix); query heads are averaged per KV group.
"""

from dataclasses import dataclass
from typing import ClassVar

from kvtrim import ops
from kvtrim.policies.base import Policy
from kvtrim.types import Float, LayerView, Scores, Tensor


@dataclass(frozen=True)
class H2O(Policy):
    window: int | None = None  # newest slots always kept; None is half of the budget
    group: ops.Reduce = "mean"  # over the query heads of one KV head
    per_query: bool = False  # divide by the number of queries that saw the token (kvpress)
    sinks: int = 0
    carries: ClassVar[bool] = True

    def lookback(self) -> int:
        return 0  # `observe` has seen every query already

    def recent(self, keep: int) -> int:
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
