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
_ECHO, _HEADS = "a table of echo", "a table of the model's heads"

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


@dataclass(frozen=True)
class Case:
    """Something that auto becomes, and when."""

    aware: bool  # context and question are read together
    needs: str  # the table, measured on exactly the model's weights; "": none
    becomes: Variant


CASES = (  # the first that holds
    Case(False, _ECHO, Variant("echo", _REFIT)),
    Case(False, "", Variant("kvzip", _REFIT)),
    Case(True, _ECHO, Variant("echo-window", _REFIT)),
    Case(True, _HEADS, Variant("headkv")),
    Case(True, "", Variant("adakv")),
)


def choice(target: Target, aware: bool) -> Choice:
    """What auto becomes on a model.

    Args:
        aware: context and question are read together.
    """
    tables = _tables(target)
    for case in CASES:
        if case.aware == aware and (not case.needs or tables[case.needs] is not None):
            return Choice(case.becomes.name, _why(case, tables), case.becomes.settings)
    raise AssertionError("one case of each protocol needs no table")


def guide() -> dict[str, str]:
    """What it becomes under which protocol, why, and how to choose otherwise: label, sentence."""
    said = {
        protocol: ", else ".join(
            f"`{case.becomes}`" + (f" where {case.needs} is here" if case.needs else "")
            for case in CASES
            if case.aware == aware
        )
        for protocol, aware in (("Question-agnostic", False), ("Question-aware", True))
    }
    return {
        "Becomes": "Another method, once it meets a model. What it became, and why, is said "
        "beside the answer.",
        **{protocol: f"{text}." for protocol, text in said.items()},
        "Tables": "Those that come with kvtrim, made from exactly the model's weights. For "
        f"another model fit one ({echo_tables.HOW_TO}) and name it: `--method echo --set "
        "table=FILE`.",
        "Why": "Measured: among methods that take no longer they lost least of the right answer's "
        "likelihood, or hardly more. docs/choosing.md has the figures.",
        "Another": "`--method NAME`, method='NAME' in Python; docs/choosing.md says which and "
        "when. auto itself takes no settings: they belong to the method that is named.",
    }


def _tables(target: Target) -> dict[str, str | None]:
    """The names of the shipped tables of a model."""
    identity = target.identity()
    return {
        _ECHO: echo_tables.measured_on(identity),
        _HEADS: head_scores.measured_on(identity),
    }


def _why(case: Case, tables: Mapping[str, str | None]) -> str:
    known = "the question is known" if case.aware else "no question is known yet"
    if case.needs:
        of = "this model's heads" if case.needs == _HEADS else "this model"
        return f"{known}, and {tables[case.needs]} is a table of {of}"
    why = f"{known}, and no table of this model is here"
    if case.aware:
        return why
    return (
        f"{why}: the prompt is read twice. Once fitted, a table saves that: {echo_tables.HOW_TO}"
    )


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
