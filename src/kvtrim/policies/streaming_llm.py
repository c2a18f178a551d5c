"""StreamingLLM: the first tokens (attention sinks) and the newest ones, nothing in between.

Paper: Xiao et al. 2023, https://arxiv.org/abs/2309.17453, section 3.2.
Code:  mit-han-lab/streaming-llm@2e50426, streaming_llm/kv_cache.py.
Ours:  the position is the score, so applying it again later still keeps the sinks.
"""

from dataclasses import dataclass

from kvtrim.policies.base import Policy
from kvtrim.types import LayerView, Scores


@dataclass(frozen=True)
class StreamingLLM(Policy):
    sinks: int = 4

    def lookback(self) -> int:
        return 0

    def score(self, layer: LayerView) -> Scores:
        """Newer is better: positions [B, K, S] to scores [B, K, S]."""
        return layer.positions.float()
