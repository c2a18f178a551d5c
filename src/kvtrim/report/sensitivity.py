"""How much each task, and each model, loses as the cache shrinks: means over methods.

Paper: Liu et al. 2025 (KVFundaBench), https://arxiv.org/abs/2502.01941, equation 1.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from kvtrim.errors import UsageError
from kvtrim.report import names
from kvtrim.report.findings import Finding
from kvtrim.report.lookup import FULL, View
from kvtrim.report.results import Section, SpeedRun


def sensitivity(sections: Sequence[Section], speeds: Sequence[SpeedRun] = ()) -> Finding:
    """Change against the full cache by measured share held: a line per task, a panel per section.

    The last panel has a line per model where there are several.

    Raises:
        UsageError: no task has scores under the full cache and another budget.
    """
    rows: list[list[Any]] = []
    left: dict[str, list[str]] = {}
    for section in sections:
        view = View(section)
        for task in view.tasks:
            own = [[section.model, section.protocol, *row] for row in _by_keep(view, task)]
            rows += own
            if not own:
                left.setdefault(section.model, []).append(task)
    if not rows:
        raise UsageError(
            "no change can be told: name folders of kvtrim eval in which the full cache scores "
            "above 0 and some methods were measured beside it"
        )
    short = names.short(row[0] for row in rows)
    drawn = [[short[row[0]], *row[1:]] for row in rows]  # legends have no room for folders
    groups = dict.fromkeys((row[0], row[1]) for row in drawn)
    panels = [_tasks([row for row in drawn if (row[0], row[1]) == group]) for group in groups]
    panels += [
        _models([row for row in drawn if row[1] == protocol], protocol)
        for protocol in dict.fromkeys(row[1] for row in drawn)
        if len({row[0] for row in drawn if row[1] == protocol}) > 1
    ]
    about = (
        "Change: (P_c - P_full) / P_full on the same samples, in percent, mean over the methods "
        "measured at a budget, with the least and the most of any method. Held: measured bytes "
        "over the full cache's, mean over the methods. Tasks on which the full cache scores "
        "nothing are left out"
    )
    told = [f"{model}: {', '.join(dict.fromkeys(tasks))}" for model, tasks in left.items()]
    about += f" ({'; '.join(told)})." if told else "."
    columns = [("model", "left"), ("protocol", "left"), ("task", "left"), ("keep", "right")]
    columns += [(name, "right") for name in ("held [%]", "change [%]", "least", "most", "methods")]
    title = "Sensitivity of tasks to the size of the cache"
    return Finding(title, about, columns, rows, panels)


def _by_keep(view: View, task: str) -> list[list[Any]]:
    """Task, budget, share held, mean change and its range over methods, how many they are."""
    found = []
    for keep in view.keeps:
        own = [row for row in view.rows if row[1] == keep and row != FULL]
        changes = [(row, view.change([task], row)) for row in own]
        known = [(row, figure.value) for row, figure in changes if figure is not None]
        held = [view.memory([task], row) for row, _ in known]
        shares = [100 * each[1] for each in held if each is not None]
        if known and shares:
            values = [100 * value for _, value in known]
            figures = fmean(shares), fmean(values), min(values), max(values)
            found.append([task, keep, *figures, len(values)])
    return found


def _tasks(rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    series = []
    for task in dict.fromkeys(row[2] for row in rows):
        own = sorted((row[4], row[5]) for row in rows if row[2] == task)
        series.append({"label": task, "x": [x for x, _ in own], "y": [y for _, y in own]})
    return _panel(f"{rows[0][0]}, {rows[0][1]}: tasks", series)


def _models(rows: Sequence[Sequence[Any]], protocol: str) -> dict[str, Any]:
    """Means over tasks that all models have, at each budget."""
    models = list(dict.fromkeys(row[0] for row in rows))
    shared = set.intersection(*({row[2] for row in rows if row[0] == m} for m in models))
    series = []
    for model in models:
        own = [row for row in rows if row[0] == model and (row[2] in shared or not shared)]
        points = []
        for keep in dict.fromkeys(row[3] for row in own):
            at = [row for row in own if row[3] == keep]
            points.append((fmean(row[4] for row in at), fmean(row[5] for row in at)))
        points.sort()
        series.append({"label": model, "x": [x for x, _ in points], "y": [y for _, y in points]})
    told = f"{len(shared)} shared tasks" if shared else "no task in common"
    return _panel(f"Models, {protocol}: mean of {told}", series)


def _panel(title: str, series: Sequence[Any]) -> dict[str, Any]:
    return {
        "kind": "lines",
        "title": title,
        "x": "held after the prompt, measured [% of the full cache]",
        "y": "change of the score [%]",
        "series": series,
        "log_x": True,
        "level": 0.0,
    }
