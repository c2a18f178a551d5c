"""What every refit has in common: kept entries become others, so that they answer for all."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from kvtrim.methods.ranges import Declared
from kvtrim.types import Aim, Counts, Float, Refitted, Tensor


class Refit(Declared, ABC):
    """What the entries that stay become. It never selects. Subclasses are frozen dataclasses."""

    changes: ClassVar[bool] = True
    """Entries become others, so that reference queries are needed."""

    queries: int = 0
    """How many reference queries answer for each KV head, its query heads taken together."""

    behind: int = 0
    """So many positions behind the prompt the prompt's own queries are turned to."""

    last: int = 0
    """So many of the prompt's last queries are added as they are, where the policy looks at them:
    the question is known then."""

    @property
    def biases(self) -> bool:
        """Every entry gets a number that is added to its logit."""
        return False

    @abstractmethod
    def fit(
        self,
        aim: Aim,
        keys: Float[Tensor, "K S D"],
        values: Float[Tensor, "K S E"],
        lengths: Counts,
        scale: float,
        softcap: float | None,
    ) -> Refitted:
        """What one layer's entries of one prompt become.

        Args:
            aim: what the full cache answers.
            keys, values: what stays; behind `lengths` [1, K] of each head garbage.
            scale, softcap: as in `LayerView`.
        """


@dataclass(frozen=True)
class Unchanged(Refit):
    """Entries stay as the model wrote them."""

    changes: ClassVar[bool] = False

    def fit(
        self,
        aim: Aim,
        keys: Float[Tensor, "K S D"],
        values: Float[Tensor, "K S E"],
        lengths: Counts,
        scale: float,
        softcap: float | None,
    ) -> Refitted:
        return Refitted(values, None)
