"""What every analysis has in common: what it is called, what it is asked, what it finds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvtrim.bench.candidates import Candidate
from kvtrim.bench.eval.encode import Input
from kvtrim.errors import UsageError
from kvtrim.report.findings import Finding
from kvtrim.report.results import Section, SpeedRun
from kvtrim.tasks.base import Task

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Subject:
    """One prompt that is looked at."""

    name: str  # of its file, or task and sample
    task: Task
    given: Input

    @property
    def tokens(self) -> int:
        """Of the whole prompt."""
        return len(self.given.ids)


@dataclass(frozen=True)
class Asked:
    """A model, prompts, and everything that an analysis may be told."""

    name: str  # of the model
    model: Any
    tokenizer: Any
    subjects: Sequence[Subject]
    aware: bool = True  # the question, if there is one, is read together with the rest
    cells: Sequence[Candidate] = ()  # methods and budgets
    keeps: Sequence[str] = ()  # the budgets alone
    rates: Sequence[float] = (0.2,)  # shares of the tokens that go on, or that count as important
    layers: Sequence[int] = ()  # empty: all of them, or as many as a picture can show
    window: int = 32  # how many last queries are asked
    seed: int = 0
    report: Report = field(default=lambda *_: None)

    @property
    def about(self) -> str:
        """On what it was measured, for the end of a sentence."""
        names = ", ".join(dict.fromkeys(subject.name for subject in self.subjects))
        lengths = sorted({subject.tokens for subject in self.subjects})
        sizes = f"{lengths[0]:,}" + (f" to {lengths[-1]:,}" if len(lengths) > 1 else "")
        count = len(self.subjects)
        lost = sum(one.given.truncated for one in self.subjects)
        cut = f" (middle of {lost} cut out)" if lost else ""
        kind = "question-aware" if self.aware else "question-agnostic"
        prompts = f"{count} prompt{'s' * (count > 1)} of {sizes} tokens{cut}"
        return f"{self.name}, {prompts} ({names}), {kind}"


@dataclass(frozen=True)
class Analysis:
    """A figure of a paper that can be drawn anew."""

    name: str
    paper: str
    figure: str  # what the paper's figure shows
    about: str  # what its table says, in a sentence
    uses: frozenset[str] = frozenset()  # which of `Asked`'s settings it acts on
    needs: tuple[str, ...] = ()  # packages of the extra "analysis"
    methods: tuple[str, ...] = ()  # by default
    keeps: tuple[str, ...] = ()


@dataclass(frozen=True)
class OfPrompts(Analysis):
    """An analysis of what a model makes of prompts."""

    compute: Callable[[Asked], Finding] = field(kw_only=True)
    least: int = 64  # tokens of a prompt
    scores: bool = False  # it needs right answers: a task, not a file


@dataclass(frozen=True)
class OfFolders(Analysis):
    """An analysis of what `kvtrim eval` and `kvtrim speed` wrote."""

    compute: Callable[[Sequence[Section], Sequence[SpeedRun]], Finding] = field(kw_only=True)


def spread_layers(count: int, wanted: int, asked: Sequence[int] = ()) -> list[int]:
    """The layers that were asked for, else so many evenly from the first to the last.

    Raises:
        UsageError: a layer that the model does not have.
    """
    wrong = [layer for layer in asked if not 0 <= layer < count]
    if wrong:
        raise UsageError(f"--layer {wrong[0]}: the layers are 0 to {count - 1}")
    if asked:
        return sorted(set(asked))
    wanted = min(wanted, count)
    return sorted({round(at * (count - 1) / max(1, wanted - 1)) for at in range(wanted)})
