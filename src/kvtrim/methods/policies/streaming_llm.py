"""StreamingLLM: the first tokens (attention sinks) and the newest ones, nothing in between.

Rule:  the score of a slot is its position; the first `sinks` slots always stay. Preset `upstream`
       is the paper's stream: before every pass the cache is cut so that it holds the budget
       afterwards, and keys act at their slot numbers, so that no distance exceeds the budget.
Paper: Xiao et al. 2023, https://arxiv.org/abs/2309.17453, section 3.2.
Code:  mit-han-lab/streaming-llm@2e50426, streaming_llm/kv_cache.py; prefill-only ports in
       dongwonjo/FastKV@b978769, Zefan-Cai/KVCache-Factory@c97f9d7 and NVIDIA/kvpress@8bb29b9.
Ours:  the position is the score, so applying it again later still keeps the sinks; a rolled key is
       rotated from where it was read to its slot instead of being stored without rotation.
"""

from dataclasses import dataclass

from kvtrim.methods.policies.base import Policy
from kvtrim.methods.ranges import Tokens
from kvtrim.types import LayerView, Scores


@dataclass(frozen=True)
class StreamingLLM(Policy):
    sinks: Tokens = 4

    def lookback(self) -> int:
        return 0

    def score(self, layer: LayerView) -> Scores:
        """Newer is better: positions [B, K, S] to scores [B, K, S]."""
        return layer.positions.float()
