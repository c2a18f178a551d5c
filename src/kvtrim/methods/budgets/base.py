"""What every budget has in common: it turns room and scores into entries per head.

And the two that say no more than that: the same number everywhere, and everything.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from kvtrim.methods.ranges import Declared
from kvtrim.methods.unit import highest
from kvtrim.types import Counts, Float, Room, Scores, Target, Tensor


class Ledger(ABC):
    """What a model-wide budget has dealt out while the layers of one group of prompts go by."""

    @abstractmethod
    def add(self, room: Room, scores: Scores, wanted: Float[Tensor, " B"]) -> list[Counts]:
        """One layer more.

        Args:
            room, scores: as in `Budget.counts`.
            wanted: how much each prompt's layer asks for, see `Policy.preference`.

        Returns:
            Entries per head of every layer so far, first layer first. A layer never gets more than
            it had before, so that cutting as the layers go by equals cutting at the end.
        """


class Budget(Declared, ABC):
    """How the entries of a model are divided over layers and heads.

    Subclasses are frozen dataclasses.
    """

    unlimited: ClassVar[bool] = False
    """Nothing is ever evicted."""

    @property
    def selective(self) -> bool:
        """Entries may have to go even where everything fits into the budget."""
        return False

    @property
    def settles(self) -> bool:
        """Later cuts go by what each head won at the prompt; else they are dealt out anew."""
        return True

    @property
    def holds_more(self) -> str:
        """Why this may deal out clearly more than `keep`, for the user; empty if it does not."""
        return ""

    @property
    def holds_less(self) -> str:
        """Why it may deal out clearly less."""
        return ""

    @property
    def model_wide(self) -> bool:
        """Layers compete: what one of them keeps is settled when the last one was read."""
        return False

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

    def open(self) -> Ledger:
        """A new ledger, for one pass over all layers (if `model_wide`)."""
        raise TypeError(f"{type(self).__name__} deals with one layer at a time")


class ModelWide(Budget):
    """A budget whose layers compete. `counts` is the share of a model of this one layer."""

    @property
    def model_wide(self) -> bool:
        return True

    @abstractmethod
    def open(self) -> Ledger:
        """A new ledger, for one pass over all layers."""

    def counts(self, room: Room, scores: Scores) -> Counts:
        alone = Room(0, 1, room.heads, room.keep, room.asked, room.protected, room.tokens)
        return self.open().add(alone, scores, scores.new_ones(scores.shape[0]))[0]


def lift(scores: Scores, safe: int) -> Scores:
    """The best `safe` of each head above every other score."""
    best = highest(scores, torch.full(scores.shape[:2], safe))
    return scores.masked_fill(best & ~scores.isneginf(), torch.inf)


def everyone(entries: int, scores: Scores) -> Counts:
    """The same number for every head of every prompt."""
    return torch.full(scores.shape[:2], entries, dtype=torch.int64)


@dataclass(frozen=True)
class Uniform(Budget):
    """Uniform: every layer and every head keeps the same number of entries."""

    def counts(self, room: Room, scores: Scores) -> Counts:
        return everyone(room.free, scores)


@dataclass(frozen=True)
class Unlimited(Budget):
    """Everything is kept: the full cache."""

    unlimited: ClassVar[bool] = True

    def counts(self, room: Room, scores: Scores) -> Counts:
        return everyone(room.candidates, scores)
