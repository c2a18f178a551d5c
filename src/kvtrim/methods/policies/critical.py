"""CriticalKV: half of the entries by attention, the other half by attention times |v W_O|.

Rule:  wraps any scorer: its scores choose the first stage; the second ranks the rest by
       (score + eps) times the mean L1 norm of the value behind the group's output projections.
Paper: Feng et al. 2025, https://arxiv.org/abs/2502.03805.
Code:  NVIDIA/kvpress@8bb29b9, presses/criticalkv_press.py (by the authors).
Ours:  sinks and window are set apart first and the two stages divide what is left
       (`count_protected`: the stages count the window too, as kvpress does).
"""

from dataclasses import dataclass, field

from kvtrim.errors import UsageError
from kvtrim.methods.policies import output
from kvtrim.methods.policies.base import Policy
from kvtrim.methods.policies.snapkv import SnapKV
from kvtrim.methods.ranges import Share, Weight
from kvtrim.types import Counts, LayerView, Scores


@dataclass(frozen=True)
class Critical(Policy):
    base: Policy = field(default_factory=SnapKV)
    first_stage: Share = 0.5  # the share of the entries that the base scores choose
    eps: Weight = 1e-4  # added to the base scores in the second stage
    eps_rel: Weight = 0.0  # and so many times their mean, for prompts beyond 10,000 tokens
    count_protected: bool = False  # the first stage's share includes sinks and window

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.base.at_sight or self.base.first_stage < 1:
            raise UsageError("CriticalKV wraps scorers that look at a window or at keys only")

    @property
    def sinks(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base.sinks

    @property
    def reads_hidden(self) -> bool:
        return self.base.reads_hidden

    def lookback(self) -> int:
        return self.base.lookback()

    def recent(self, keep: int) -> int:
        return self.base.recent(keep)

    def score(self, layer: LayerView) -> Scores:
        """The base scores, [B, K, N]."""
        return self.base.score(layer)

    def first_entries(self, counts: Counts, keep: int) -> Counts:
        protected = self.sinks + self.recent(keep) if self.count_protected else 0
        return (((counts + protected) * self.first_stage).long() - protected).clamp(min=0)

    def rescore(self, layer: LayerView, scores: Scores) -> Scores:
        """(score + eps) x |v W_O|, [B, K, N]; |.| is the L1 norm, averaged over the group."""
        sizes = output.projected_norms_l1(layer, scores.shape[-1])
        eps = self.eps + self.eps_rel * scores.mean(dim=-1, keepdim=True)
        return (scores + eps) * sizes
