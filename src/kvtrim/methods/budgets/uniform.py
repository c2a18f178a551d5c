"""Uniform: every layer and every head keeps the same number of entries."""

from dataclasses import dataclass
from typing import ClassVar

from kvtrim.methods.budgets.base import Budget, everyone
from kvtrim.types import Counts, Room, Scores


@dataclass(frozen=True)
class Uniform(Budget):
    def counts(self, room: Room, scores: Scores) -> Counts:
        return everyone(room.free, scores)


@dataclass(frozen=True)
class Unlimited(Budget):
    """Everything is kept: the full cache."""

    unlimited: ClassVar[bool] = True

    def counts(self, room: Room, scores: Scores) -> Counts:
        return everyone(room.candidates, scores)
