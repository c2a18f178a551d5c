"""What every budget has in common: it turns room and scores into entries per head, nothing
else.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from kvtrim.types import Counts, Room, Scores, Target


class Budget(ABC):
    """How the entries of a model are divided over layers and heads.

    Subclasses are frozen dataclasses.
    """

    unlimited: ClassVar[bool] = False
    """Nothing is ever evicted."""

    def fitted(self, target: Target) -> "Budget":
        """This budget, made ready for one model.

        Raises:
            UsageError: it cannot serve that model.
        """
        return self

    @abstractmethod
    def counts(self, room: Room, scores: Scores) -> Counts:
        """Entries that each head keeps among its candidates.

        `scores` [B, K, N] may be ignored. Each count is at most `room.candidates`. The tensor
        lives on the CPU, since the store needs the numbers on the host to lay itself out.
        """


def everyone(entries: int, scores: Scores) -> Counts:
    """The same number for every head of every prompt."""
    return torch.full(scores.shape[:2], entries, dtype=torch.int64)
