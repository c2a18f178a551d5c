"""auto: what was measured best for the protocol and the model at hand.

Rule:  where the question is not known yet, `echo` if a table of exactly these weights comes with
       kvtrim, else `kvzip`, which reads the prompt a second time, either with refit=values+bias;
       where context and question are read together, `echo-window` with the same refit if there is
       such a table, else `headkv` if there is one of the model's heads, else `adakv`.
Ours:  the choice is what lost least of the answer's likelihood on the committed prompts
       (experiments/echo, experiments/aware, experiments/quality); it is made when a cache meets
       its model, and saved with it under its own name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from kvtrim.errors import UsageError
from kvtrim.methods import echo_tables
from kvtrim.methods.budgets import head_scores
from kvtrim.methods.method import Method
from kvtrim.methods.policies.base import Policy
from kvtrim.methods.refit import REFITS
from kvtrim.methods.registry import METHODS
from kvtrim.methods.variant import Variant
from kvtrim.types import LayerView, Scores, Target

NAME = "auto"
_REFIT = {"refit": "values+bias"}

NO_SETTINGS = (
    "auto takes no settings, since it chooses the method itself: name one (method='echo', "
    "--method echo) to set its parameters"
)


@dataclass(frozen=True)
class Auto(Policy):
    """Stands for another method until it meets a model."""

    @property
    def reads_hidden(self) -> bool:
        """It may become echo."""
        return True

    def lookback(self) -> int:
        """None: it never scores."""
        return 0

    def score(self, layer: LayerView) -> Scores:
        """Refused: TypeError."""
        raise TypeError("auto stands for another method until a cache meets its model")


AUTO = Method(
    Auto(),
    source="measured here",
    use="Whenever you do not want to choose: what was measured best for model and protocol.",
    cost="Question-agnostic: one prefill with a table of the model (echo), else a second reading "
    "(kvzip), and a tenth of a prefill for the refit. Question-aware: the same with a table "
    "of echo, else a window's attention and, at most, a product per token.",
)


@dataclass(frozen=True)
class Choice:
    """The method that auto became, and why."""

    name: str
    why: str
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """As a command line takes it."""
        return str(Variant(self.name, self.settings))

    @property
    def method(self) -> Method:
        """With its settings, not yet ready for any model."""
        method = METHODS[self.name]
        return replace(method, **{key: REFITS[value]() for key, value in self.settings.items()})


def choice(target: Target, aware: bool) -> Choice:
    """What auto becomes on a model.

    Args:
        aware: context and question are read together.
    """
    found = echo_tables.measured_on(target.identity())
    if found is not None:
        why = f"{found} is a table of this model"
        if aware:
            return Choice("echo-window", f"the question is known, and {why}", _REFIT)
        return Choice("echo", f"no question is known yet, and {why}", _REFIT)
    if not aware:
        why = (
            "no question is known yet, and no table of this model is here: the prompt is read "
            f"twice. Once fitted, a table saves that: {echo_tables.HOW_TO}"
        )
        return Choice("kvzip", why, _REFIT)
    heads = head_scores.measured_on(target.identity())
    if heads is not None:
        why = f"the question is known, and {heads} is a table of this model's heads"
        return Choice("headkv", why)
    return Choice("adakv", "the question is known, and no table of this model is here")


def resolve(method: Method, target: Target, aware: bool) -> tuple[Method, Choice | None]:
    """A method made ready for a model, and what auto became if it was that.

    Raises:
        UsageError: auto with settings of its own; and as `Method.fitted`.
    """
    if not isinstance(method.policy, Auto):
        return method.fitted(target), None
    if method != AUTO:
        raise UsageError(NO_SETTINGS)
    chosen = choice(target, aware)
    return chosen.method.fitted(target), chosen
