"""SnapKV: a past token matters as much as the prompt's last queries attend to it.

Rule:  the softmax attention (over all keys) that the prompt's last `window` queries give a slot,
       added up over those queries and averaged over the query heads of its KV head; then each slot
       takes the largest value among its `kernel` neighbours. The window itself always stays.
Paper: Li et al. 2024, https://arxiv.org/abs/2404.14469, section 4.
Code:  FasterDecoding/SnapKV@e216ddc, snapkv/monkeypatch/snapkv_utils.py; variants in
       Zefan-Cai/KVCache-Factory@c97f9d7, dongwonjo/FastKV@5322e1a and NVIDIA/kvpress@8bb29b9.
Ours:  fp32 throughout; query heads are averaged inside their KV group before the pooling.
"""

from dataclasses import dataclass
from typing import Literal

from kvtrim.methods.policies import ops
from kvtrim.methods.policies.base import WindowPolicy
from kvtrim.methods.ranges import Kernel, Some, Tokens
from kvtrim.types import LayerView, Scores


@dataclass(frozen=True)
class SnapKV(WindowPolicy):
    window: Some = 32  # how many last queries vote (the observation window); their slots stay
    kernel: Kernel = 7  # width of the pooling, odd
    pool: ops.Pool = "max"  # what a slot takes from its `kernel` neighbours
    rows: Literal["sum", "mean"] = "sum"  # over the window's queries; ranks alike
    group: ops.Reduce = "mean"  # over the query heads of one KV head
    group_order: Literal["before", "after"] = "before"  # before or after the pooling
    sinks: Tokens = 0

    def score(self, layer: LayerView) -> Scores:
        """Votes of the window: queries [B, H, W, D], keys [B, K, S, D] to scores [B, K, S - W]."""
        kv_heads, votes = layer.keys.shape[1], ops.window_sums(layer, self.window)  # [B, H, N]
        if self.rows == "mean":
            votes = votes / layer.queries[:, :, -self.window :].shape[2]
        if self.group_order == "before":
            votes = ops.reduce_group(votes, kv_heads, self.group)
            return ops.pool(votes, self.kernel, self.pool)
        votes = ops.pool(votes, self.kernel, self.pool)
        return ops.reduce_group(votes, kv_heads, self.group)
