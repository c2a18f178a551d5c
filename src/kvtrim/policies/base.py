"""What every scoring rule has in common.

A policy scores; it never counts, selects or touches a cache.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from kvtrim.errors import UsageError
from kvtrim.types import Float, LayerView, Scores, Tensor


class Policy(ABC):
    """A scoring rule: one layer's view to one score per candidate slot and KV head.

    Subclasses are frozen dataclasses, one per file, and final. `lookback` is abstract on purpose:
    a rule that does not say which queries it needs cannot be built.
    """

    sinks: int = 0
    """First slots of the prompt that are kept whatever their score."""

    carries: ClassVar[bool] = False
    """It keeps a running statistic per slot, which `observe` updates at every forward pass."""

    def observes(self, decoding: bool) -> bool:
        """Whether `observe` is wanted for passes over the prompt, or (`decoding`) after it."""
        return self.carries

    @abstractmethod
    def lookback(self) -> int:
        """How many of the last queries `score` reads."""

    def recent(self, keep: int) -> int:
        """How many of the newest slots are kept whatever their score, out of `keep`."""
        return 0

    def observe(self, layer: LayerView) -> Float[Tensor, "B K S"]:
        """Update the running statistic of every slot from this pass's queries (if `carries`).

        `layer.queries` are all queries of the pass and `layer.carried` is the statistic before it,
        0 for new slots. What is returned becomes `layer.carried` of `score` and of the next pass.
        """
        raise TypeError(f"{type(self).__name__} keeps no running statistic")

    @abstractmethod
    def score(self, layer: LayerView) -> Scores:
        """Score the slots, higher = keep: all S of them, or the first S - recent(keep)."""


def require_odd(name: str, value: int) -> None:
    """Refuse a pooling width that has no middle."""
    if value < 1 or value % 2 == 0:
        raise UsageError(f"{name} must be odd and positive, got {value}; try {value + 1}")
