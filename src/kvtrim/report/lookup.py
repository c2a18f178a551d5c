"""A section's lines looked up by task, method and budget; figures of a cell."""

from collections.abc import Callable, Iterable
from functools import cached_property
from statistics import fmean
from typing import Any

from kvtrim.errors import BudgetError
from kvtrim.methods.keep import Keep
from kvtrim.report import families, statistics
from kvtrim.report.results import Line, Section
from kvtrim.report.statistics import Figure

FULL = ("full", "")
Row = tuple[str, str]  # method and budget
Where = Callable[[Line], bool]


class View:
    """Lines of a section by (task, method, budget)."""

    def __init__(self, section: Section):
        self.section = section
        self._lines: dict[tuple[str, str, str], dict[str, Line]] = {}
        self._known: dict[Any, Figure | None] = {}
        for line in section.lines:
            key = (line.task, line.method, line.keep)
            self._lines.setdefault(key, {})[line.sample] = line

    @cached_property
    def tasks(self) -> list[str]:
        """Every task, as first met."""
        return list(dict.fromkeys(line.task for line in self.section.lines))

    @cached_property
    def cut(self) -> set[str]:
        """The tasks of which some prompt lost the middle of its document."""
        return {line.task for line in self.section.lines if line.truncated}

    @cached_property
    def fitted(self) -> set[str]:
        """The tasks whose samples are only those that did not have to be cut."""
        records = [run.record for run in self.section.runs]
        return {task for record in records if record.get("fitting") for task in record["tasks"]}

    @cached_property
    def raised(self) -> set[str]:
        """The tasks whose answers could be longer than they may be by themselves."""
        return {task for run in self.section.runs for task in run.record.get("raised", [])}

    @cached_property
    def shortened(self) -> set[str]:
        """The tasks whose answers had to be shorter than they may be by themselves."""
        bounds = [
            (run.record["tasks"], run.record.get("max_new_tokens")) for run in self.section.runs
        ]
        return {
            name
            for tasks, bound in bounds
            for name, task in tasks.items()
            if bound is not None and bound < task.get("max_new_tokens", bound)
        }

    @cached_property
    def rows(self) -> list[Row]:
        """The full cache, then every budget with its methods, the smallest first."""
        met = dict.fromkeys((line.method, line.keep) for line in self.section.lines)
        order = sorted(met, key=lambda row: size_of(row[1]))
        return [FULL] * (FULL in met) + [row for row in order if row != FULL]

    @cached_property
    def methods(self) -> list[str]:
        """Every method but the full cache."""
        return list(dict.fromkeys(method for method, _ in self.rows if method != FULL[0]))

    @cached_property
    def keeps(self) -> list[str]:
        """Every budget, the smallest first."""
        return sorted({keep for _, keep in self.rows if keep}, key=size_of)

    def lines(self, task: str, row: Row, where: Where | None = None) -> list[Line]:
        """What a method and budget made of a task's samples."""
        own = self._lines.get((task, *row), {}).values()
        return [line for line in own if where is None or where(line)]

    def values(
        self, task: str, row: Row, name: str = "score", where: Where | None = None
    ) -> list[float]:
        """One figure of every sample that has it."""
        found = (line.figure(name) for line in self.lines(task, row, where))
        return [value for value in found if value is not None]

    def mean(
        self, tasks: Iterable[str], row: Row, name: str = "score", where: Where | None = None
    ) -> Figure | None:
        """The mean over tasks of their means; tasks without this figure are left out."""
        own = [self.values(task, row, name, where) for task in tasks]
        return self._once(statistics.mean_of_means, [values for values in own if values])

    def mean_of_groups(self, groups: Iterable[Iterable[str]], row: Row) -> Figure | None:
        """The mean over groups of tasks of the means over their tasks, as `mean` is over tasks."""
        found = [[self.values(task, row) for task in tasks] for tasks in groups]
        own = [[values for values in group if values] for group in found]
        return statistics.mean_of_groups([group for group in own if group])

    def cell(self, task: str, row: Row, where: Where | None = None) -> float | None:
        """The mean score alone, where its interval is not shown."""
        own = self.values(task, row, where=where)
        return sum(own) / len(own) if own else None

    def tasks_with_score(self, tasks: Iterable[str], row: Row) -> list[str]:
        """The tasks of which a method and budget has a score."""
        return [task for task in tasks if self.values(task, row)]

    def pairs(self, task: str, row: Row, name: str = "score") -> list[tuple[float, float]]:
        """(own, full cache's) of the samples that both have."""
        base = self._lines.get((task, *FULL), {})
        found = []
        for line in self.lines(task, row):
            own, full = line.figure(name), base.get(line.sample)
            other = None if full is None else full.figure(name)
            if own is not None and other is not None:
                found.append((own, other))
        return found

    def change(self, tasks: Iterable[str], row: Row) -> Figure | None:
        """(P_c - P_full) / P_full over the samples that both have."""
        own = [self.pairs(task, row) for task in tasks]
        return self._once(statistics.change, [pairs for pairs in own if pairs])

    def rise(self, tasks: Iterable[str], row: Row) -> Figure | None:
        """By how much the loss exceeds the full cache's, in nats per token."""
        own = [[a - b for a, b in self.pairs(task, row, "loss")] for task in tasks]
        return self._once(statistics.mean_of_means, [values for values in own if values])

    def _once(self, figure: Callable[[Any], Figure | None], values: Any) -> Figure | None:
        """A figure of these values, drawn once however often it is shown."""
        key = figure, tuple(map(tuple, values))
        if key not in self._known:
            self._known[key] = figure(values)
        return self._known[key]

    def memory(self, tasks: Iterable[str], row: Row) -> tuple[float, float] | None:
        """Bytes held after the prompt, and their share of the full cache's: means over tasks."""
        means = []
        for task in tasks:
            lines = [line.figures for line in self.lines(task, row)]
            own = [(one["held_bytes"], one["full_bytes"]) for one in lines]
            both = [(held, full) for held, full in own if held is not None and full]
            if both:
                means.append((fmean(held for held, _ in both), fmean(h / f for h, f in both)))
        if not means:
            return None
        return fmean(held for held, _ in means), fmean(part for _, part in means)

    def tasks_by_name(self, family: Callable[[str], str | None]) -> dict[str, str]:
        """The tasks of a benchmark by the name that its papers use."""
        return {name: task for task in self.tasks if (name := family(task)) is not None}

    @cached_property
    def grids(self) -> list[str]:
        """Tasks whose samples have a length and a depth: needles in a haystack."""
        met = {
            task: [x.group for x in self.section.lines if x.task == task] for task in self.tasks
        }
        own = [task for task, groups in met.items() if families.is_grid(groups)]
        return [task for task in own if families.ruler(task) is None]

    @cached_property
    def shots(self) -> dict[int, str]:
        """GSM8K tasks by the number of worked examples in their prompts."""
        found = {}
        for line in self.section.lines:
            count = families.shots(line.task, line.group)
            if count is not None:
                found[count] = line.task
        return dict(sorted(found.items()))

    @cached_property
    def others(self) -> list[str]:
        """Tasks that no table of its own shape shows."""
        known = {*self.grids, *self.shots.values()}
        known |= {
            *self.tasks_by_name(families.longbench).values(),
            *self.tasks_by_name(families.ruler).values(),
        }
        return [task for task in self.tasks if task not in known]


def size_of(keep: str) -> tuple[int, float]:
    """For sorting budgets: tokens, then shares, then bytes; each by size."""
    kind, value = budget(keep)
    return {"full": 3, "tokens": 0, "share": 1, "bytes": 2}[kind], value


def budget(keep: str) -> tuple[str, float]:
    """A budget as text in numbers: ("tokens", 512), ("share", 0.25); 0 bytes of what is none."""
    if not keep.strip():
        return "full", 1.0
    try:
        found = Keep.parse(keep)
    except BudgetError:
        return "bytes", 0.0
    return found.kind, found.amount


def rounded_budget(keep: str) -> tuple[str, float]:
    """As `budget`, equal where budgets that were worked out in different ways are the same."""
    kind, amount = budget(keep)
    return kind, round(amount, 6)
