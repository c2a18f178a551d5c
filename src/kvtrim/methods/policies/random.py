"""Random: slots are kept by chance. The floor that a method has to clear to be worth its name.

Rule:  a uniform random number per slot and KV head; sinks and the newest `window` slots stay.
Paper: none.
Ours:  drawn on the CPU from (seed, layer), once for each position, so that a run repeats exactly
       on any device, a prompt keeps the same slots alone and inside a batch, and a token's draw
       stays the same whatever else is held.
"""

from dataclasses import dataclass

import torch

from kvtrim.methods.policies.base import Policy
from kvtrim.methods.ranges import Seed, Tokens
from kvtrim.types import LayerView, Scores


@dataclass(frozen=True)
class Random(Policy):
    window: Tokens = 32  # newest slots always kept, as in the window methods, so that they compare
    sinks: Tokens = 4
    seed: Seed = 0  # another number draws another sample

    def lookback(self) -> int:
        return 0

    def recent(self, keep: int) -> int:
        return self.window

    def score(self, layer: LayerView) -> Scores:
        """One draw per KV head and position: positions [B, K, S] to scores [B, K, S]."""
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + layer.index)
        heads = layer.keys.shape[1]
        count = max(layer.tokens, int(layer.positions.max()) + 1)  # a layer may have read a part
        drawn = torch.rand(count, heads, generator=draw).T.to(layer.keys.device)
        return drawn.expand(len(layer.positions), -1, -1).gather(2, layer.positions.long())
