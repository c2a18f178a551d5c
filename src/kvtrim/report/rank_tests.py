"""Whether methods differ over tasks: Friedman's test of their ranks, Nemenyi's for each pair.

Tasks are the blocks and methods the treatments: on every task the methods of one budget are
ranked by their mean score, 1 being the best and equals sharing their mean. Two methods differ if
their mean ranks are further apart than the critical difference.

Source: Demsar 2006, Journal of Machine Learning Research 7, sections 3.2.2 and 3.2.3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from typing import Any

from kvtrim.errors import UsageError
from kvtrim.report.findings import Finding
from kvtrim.report.lookup import FULL, View
from kvtrim.report.results import Section, SpeedRun

LEVEL = 0.05
_METHODS, _TASKS = 3, 2  # below these there is nothing to test


@dataclass(frozen=True)
class Ranked:
    """Methods by their mean ranks over tasks, the best first."""

    methods: tuple[tuple[str, float], ...]
    tasks: int
    statistic: float  # Friedman's chi-square, corrected for equals
    p: float
    distance: float  # Nemenyi's critical difference

    @property
    def cliques(self) -> list[tuple[float, float]]:
        """Where the longest runs of methods begin and end that cannot be told apart."""
        found: list[tuple[float, float]] = []
        means = [mean for _, mean in self.methods]
        for first, low in enumerate(means):
            high = max(mean for mean in means[first:] if mean - low <= self.distance)
            if high > low and not any(a <= low and high <= b for a, b in found):
                found.append((low, high))
        return found


def rank(scores: Mapping[str, Sequence[float]]) -> Ranked:
    """Test methods by their scores on the same tasks.

    Raises:
        UsageError: too few methods or tasks, or scipy is not installed.
    """
    stats: Any
    try:
        from scipy import stats
    except ModuleNotFoundError:
        raise UsageError('this analysis needs scipy: pip install "kvtrim[analysis]"') from None
    count, tasks = len(scores), len(next(iter(scores.values()), ()))
    if count < _METHODS or tasks < _TASKS:
        raise UsageError(
            f"{count} methods on {tasks} tasks cannot be tested; at least {_METHODS} methods with "
            f"scores on the same {_TASKS} tasks are needed"
        )
    places = [
        stats.rankdata([-own[task] for own in scores.values()]).tolist() for task in range(tasks)
    ]
    means = [sum(column) / tasks for column in zip(*places, strict=True)]
    statistic, p = 0.0, 1.0  # where all methods are equal on every task
    if any(len(set(own)) > 1 for own in places):
        test = stats.friedmanchisquare(*scores.values())
        statistic, p = float(test.statistic), float(test.pvalue)
    apart = float(stats.studentized_range.ppf(1 - LEVEL, count, inf)) / sqrt(2)
    distance = apart * sqrt(count * (count + 1) / (6 * tasks))
    order = sorted(zip(scores, means, strict=True), key=lambda one: one[1])
    return Ranked(tuple(order), tasks, statistic, p, distance)


def friedman(sections: Sequence[Section], speeds: Sequence[SpeedRun] = ()) -> Finding:
    """The tests for every budget of every model and protocol.

    Raises:
        UsageError: no budget has enough methods and tasks.
    """
    rows, panels, why = [], [], ""
    for section in sections:
        view = View(section)
        for keep in view.keeps:
            methods = [method for method, own in view.rows if own == keep and method != FULL[0]]
            scores = _scores(view, methods, keep)
            try:
                found = rank(scores)
            except UsageError as error:
                if "scipy" in str(error):
                    raise
                why = f"keep {keep}: {error}"
                continue
            title = f"{section.title}, keep {keep}: {found.tasks} tasks, p = {found.p:.2g}"
            panels.append(
                {
                    "kind": "ranks",
                    "title": title,
                    "methods": found.methods,
                    "distance": found.distance,
                    "cliques": found.cliques,
                }
            )
            best = found.methods[0][1]
            for method, mean in found.methods:
                worse = "yes" if mean - best > found.distance else "no"
                own = scores[method]
                start = [section.title, keep, method, mean, 100 * sum(own) / len(own), worse]
                rows.append([*start, found.tasks, found.statistic, found.p, found.distance])
    if not rows:
        raise UsageError(
            f"nothing to test ({why or 'no budget was measured'}); name folders of kvtrim eval "
            "with at least three methods and two tasks at one --keep"
        )
    about = (
        "Methods are ranked on every task by their mean score (1: best; equals share); only "
        "tasks on which all methods of a budget have scores count. Friedman's test of all ranks; "
        f"Nemenyi's critical difference at {LEVEL:.0%}: methods further apart in mean rank "
        "differ. Worse: than the best of the budget, by that difference."
    )
    columns = [("measured", "left"), ("keep", "right"), ("method", "left"), ("rank", "right")]
    columns += [("score", "right"), ("worse", "left"), ("tasks", "right"), ("chi²", "right")]
    columns += [("p", "right"), ("critical difference", "right")]
    return Finding("Ranks of methods over tasks", about, columns, rows, panels, across=1)


def _scores(view: View, methods: Sequence[str], keep: str) -> dict[str, list[float]]:
    """Mean scores of each method that has any, on the tasks that all of these have."""
    methods = [name for name in methods if view.tasks_with_score(view.tasks, (name, keep))]
    tasks = [
        task for task in view.tasks if all(view.values(task, (name, keep)) for name in methods)
    ]
    found: dict[str, list[float]] = {}
    for name in methods:
        cells = [view.cell(task, (name, keep)) for task in tasks]
        found[name] = [cell for cell in cells if cell is not None]
    return found
