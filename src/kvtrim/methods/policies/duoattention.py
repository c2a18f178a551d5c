"""DuoAttention: heads that retrieve keep everything, the others the first tokens and the newest.

Rule:  the score of a slot is its position; the first `sinks` and the newest `window` slots always
       stay, of small budgets half at most. Which heads keep everything is the budget's choice.
Paper: Xiao et al. 2024, https://arxiv.org/abs/2410.10819.
Code:  mit-han-lab/duo-attention@fe93c31, README.md (64 sinks, 256 recent: preset `paper`);
       NVIDIA/kvpress@8bb29b9, presses/duo_attention_press.py.
Ours:  4 sinks and 64 recent tokens by default, since budgets here are small; layers read the whole
       prompt before anything is evicted (there, streaming heads read it through their window).
"""

from dataclasses import dataclass

from kvtrim.methods.policies.base import Policy
from kvtrim.methods.ranges import Tokens
from kvtrim.types import LayerView, Scores


@dataclass(frozen=True)
class DuoAttention(Policy):
    sinks: Tokens = 4
    window: Tokens = 64  # newest slots that stay too, with the sinks half of the budget at most

    def lookback(self) -> int:
        return 0

    def recent(self, keep: int) -> int:
        return min(self.window, max(0, keep // 2 - self.sinks))

    def score(self, layer: LayerView) -> Scores:
        """Newer is better: positions [B, K, S] to scores [B, K, S]."""
        return layer.positions.float()
