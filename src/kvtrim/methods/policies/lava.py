"""LAVa: window attention times the largest value norm of the head.

Rule:  the attention of the last `window` queries, averaged, max-pooled over `kernel` neighbours
       and multiplied by the largest L1 norm of the head's values; of a group the largest query
       head counts. Layers share the budget by the entropy of these scores, heads compete.
Paper: https://arxiv.org/abs/2509.09754.
Code:  MGDDestiny/Lava@71d3cc8, adaptive_snapkv/monkeypatch/snapkv_utils.py, LavaKVCluster.
Ours:  the heads' floor is a share of what their layer gets (a misspelt name in the public code
       leaves it a share of the whole budget, above what was asked for; `floor_of=keep`).
"""

from dataclasses import dataclass

from kvtrim.methods.policies import ops
from kvtrim.methods.policies.base import WindowPolicy
from kvtrim.methods.ranges import Kernel, Some, Tokens
from kvtrim.types import LayerView, Scores


@dataclass(frozen=True)
class Lava(WindowPolicy):
    window: Some = 32  # how many last queries are asked; their slots always stay
    kernel: Kernel = 7  # width of the pooling, odd
    pool: ops.Pool = "max"
    sinks: Tokens = 0

    def score(self, layer: LayerView) -> Scores:
        """Queries [B, H, W, D], keys and values [B, K, S, D] to scores [B, K, S - W]."""
        kv_heads, candidates = layer.keys.shape[1], layer.keys.shape[2] - self.window
        weights = ops.window_attention(layer, self.window)
        votes = ops.pool(weights.mean(dim=-2), self.kernel, self.pool)
        values = ops.clear_window(layer, layer.values, self.window)[:, :, :candidates]
        size = values.float().abs().sum(dim=-1)
        votes = ops.reduce_group(votes, kv_heads, "max")
        return votes * size.amax(dim=-1, keepdim=True) if candidates else votes
