"""What every propagation has in common: it says which hidden states go on to deeper layers."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from kvtrim.methods.policies.base import Policy
from kvtrim.methods.ranges import Declared
from kvtrim.types import Int, LayerView, Target, Tensor


class Propagation(Declared, ABC):
    """Which hidden states go on to deeper layers while the prompt is read.

    Subclasses are frozen dataclasses. Layers count from 0. A prompt that fits into its budget is
    read by every layer as a whole, whatever the propagation.
    """

    narrows: ClassVar[bool] = True
    """Some layers do not read the whole prompt, which therefore comes in one pass."""

    restarts: ClassVar[bool] = False
    """A first reading chooses tokens; the model then reads those alone, closed up."""

    @property
    def holds_more(self) -> str:
        """Why layers may hold clearly more than `keep`, for the user; empty if they do not."""
        return ""

    @property
    def holds_less(self) -> str:
        """Why layers may hold clearly less."""
        return ""

    def fitted(self, target: Target) -> "Propagation":
        """This propagation, made ready for one model.

        Raises:
            UsageError: it cannot serve that model.
        """
        return self

    def least(self, tokens: int, layers: int) -> int:
        """The smallest mean number of entries per head that this can leave of a prompt."""
        return 1

    @abstractmethod
    def chooses(self, layer: int, layers: int) -> bool:
        """Whether tokens are chosen at this layer."""

    @abstractmethod
    def choose(self, view: LayerView, policy: Policy, prompt: int) -> Int[Tensor, "B T"] | None:
        """The slots of a layer whose tokens go on, ascending.

        The last one should be among them, since the answer begins with its logits.

        Args:
            view: the layer before anything is evicted from it, with all its queries.
            policy: the method's own scoring rule.
            prompt: tokens of each prompt; the layer may have read fewer.

        Returns:
            None if all of them go on.
        """


@dataclass(frozen=True)
class Everything(Propagation):
    """Every layer reads the whole prompt."""

    narrows: ClassVar[bool] = False

    def chooses(self, layer: int, layers: int) -> bool:
        return False

    def choose(self, view: LayerView, policy: Policy, prompt: int) -> None:
        return None
