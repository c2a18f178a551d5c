"""Quality against what it costs: bytes held, time to the first token, tokens per second.

Scores and bytes come from folders of `kvtrim eval`, seconds from those of `kvtrim speed` on the
same model, at the prompt length nearest to the evaluation's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvtrim.errors import UsageError
from kvtrim.report import speed
from kvtrim.report.findings import Finding
from kvtrim.report.lookup import FULL, Row, View, budget
from kvtrim.report.results import Section, SpeedRun
from kvtrim.report.statistics import Figure

FEWEST = 1  # of a speed run's batches: one prompt


@dataclass(frozen=True)
class Point:
    """One method at one budget: what it is worth and what it costs."""

    method: str
    keep: str  # "" for the full cache
    score: Figure
    held_bytes: float
    share: float  # of the full cache's bytes
    ttft_s: float | None = None
    tokens_per_s: float | None = None

    @property
    def row(self) -> Row:
        """As a section has it."""
        return self.method, self.keep


COSTS: Mapping[str, tuple[Callable[[Point], float | None], bool]] = {
    "bytes held [% of the full cache]": (lambda point: 100 * point.share, True),
    "time to first token [s]": (lambda point: point.ttft_s, True),
    "tokens per second": (lambda point: point.tokens_per_s, False),
}
"""What a point costs, and whether less of it is better."""


def points(view: View, speeds: Sequence[SpeedRun]) -> list[Point]:
    """Every method and budget that has scores on all tasks of the full cache."""
    whole = view.tasks_with_score(view.tasks, FULL) or view.tasks
    timed = _speed_rows(view.section, speeds)
    found = []
    for row in view.rows:
        score, held = view.mean(whole, row), view.memory(whole, row)
        if score is None or held is None or len(view.tasks_with_score(whole, row)) < len(whole):
            continue
        own = timed.get((row[0], budget(row[1])), {})
        seconds = own.get("ttft_s"), own.get("tokens_per_s")
        found.append(Point(*row, score, *held, *seconds))
    return found


def _speed_rows(
    section: Section, speeds: Sequence[SpeedRun]
) -> dict[tuple[str, tuple[str, float]], Mapping[str, Any]]:
    """Rows of the speed runs of the same model, by method and budget."""
    near: dict[tuple[str, tuple[str, float]], Mapping[str, Any]] = {}
    wanted = float(section.length) if section.length.isdigit() else float("inf")
    for run in speeds:
        if run.record["model"]["name"] != section.model:
            continue
        for row in speed.rows(run.lines, run.record["limits"]):
            if row["batch"] != FEWEST or "token_s" not in row:
                continue
            key = row["method"], budget(row["keep"])
            known = near.get(key)
            if known is None or _far(row, wanted) < _far(known, wanted):
                near[key] = row
    return near


def _far(row: Mapping[str, Any], wanted: float) -> float:
    return -row["length"] if wanted == float("inf") else abs(row["length"] - wanted)


def front(found: Sequence[Point], cost: str) -> list[Point]:
    """The points that no other beats in both score and cost, from the cheapest on."""
    what, less = COSTS[cost]
    placed = [(value if less else -value, p) for p in found if (value := what(p)) is not None]
    best: list[Point] = []
    for _, point in sorted(placed, key=lambda one: (one[0], -one[1].score.value)):
        if not best or point.score.value > best[-1].score.value:
            best.append(point)
    return best


def frontier(sections: Sequence[Section], speeds: Sequence[SpeedRun] = ()) -> Finding:
    """Quality against each cost: a table, and a row of panels for each protocol.

    Raises:
        UsageError: nothing was scored.
    """
    rows, panels = [], []
    for section in sections:
        found = points(View(section), speeds)
        if not found:
            continue
        fronts = {cost: front(found, cost) for cost in COSTS}
        for point in found:
            on = [
                short for short, own in zip(_SHORT, fronts.values(), strict=True) if point in own
            ]
            figures = 100 * point.score.value, 100 * point.share, point.held_bytes / 2**20
            seconds = point.ttft_s, point.tokens_per_s
            start = [section.title, point.method, point.keep or "all"]
            rows.append([*start, *figures, *seconds, ", ".join(on) or "-"])
        shown = [cost for cost in COSTS if len(_place(found, cost)) > 1]
        panels += [_panel(section, found, fronts[cost], cost) for cost in shown]
    if not rows:
        raise UsageError("nothing was scored in these folders; name those of kvtrim eval")
    about = (
        "Score: plain mean over the tasks that the full cache has scores on, 0 to 100. Held: "
        "measured after the prompt. Seconds: medians of kvtrim speed on the same model, one "
        "prompt, at the length nearest to the evaluation's; a dash where that was not measured. "
        "On the front: no other row is better in score and this cost."
    )
    columns = [("measured", "left"), ("method", "left"), ("keep", "right"), ("score", "right")]
    columns += [("held [%]", "right"), ("held [MiB]", "right"), ("first token [s]", "right")]
    columns += [("tokens/s", "right"), ("on the front of", "left")]
    across = max(1, min(3, len(panels)))
    return Finding("Quality against cost", about, columns, rows, panels, across=across)


_SHORT = ("bytes", "first token", "tokens/s")


def _place(found: Sequence[Point], cost: str) -> list[Point]:
    return [point for point in found if COSTS[cost][0](point) is not None]


def _panel(
    section: Section, found: Sequence[Point], best: Sequence[Point], cost: str
) -> dict[str, Any]:
    what = COSTS[cost][0]
    series = []
    for method in dict.fromkeys(point.method for point in _place(found, cost)):
        own = sorted(
            (what(p), 100 * p.score.value) for p in _place(found, cost) if p.method == method
        )
        series.append({"label": method, "x": [x for x, _ in own], "y": [y for _, y in own]})
    edge = sorted((what(point), 100 * point.score.value) for point in best)
    return {
        "kind": "lines",
        "title": section.title,
        "x": cost,
        "y": "mean score [0 to 100]",
        "series": series,
        "front": [[x for x, _ in edge], [y for _, y in edge]],
        "log_x": "bytes" in cost,
    }
