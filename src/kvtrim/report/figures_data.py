"""What is to be drawn of a section, as plain data; `kvtrim.report.plots.evaluation` draws it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvtrim.report import families
from kvtrim.report import names as naming
from kvtrim.report.evaluation import benchmarks
from kvtrim.report.lookup import FULL, Row, View
from kvtrim.report.statistics import Figure

Picture = Mapping[str, Any]
HELD = "held after the prompt, measured [% of the full cache]"


def all_pictures(view: View) -> list[Picture]:
    """Every picture that has something in it."""
    made: list[Picture] = [_accuracy(view), *_changes(view), *_fidelity(view)]
    made += [*_grids(view), *_matrices(view), *_shots(view)]
    names = naming.Names()  # keep 10 and keep 10% look the same in a name
    shown = [picture for picture in made if any(panel_of(picture))]
    return [{**one, "name": names.new(one["name"]).replace(" ", "-")} for one in shown]


def panel_of(picture: Picture) -> Sequence[Any]:
    """The panels or series of a picture."""
    return picture.get("series") or picture.get("panels") or []


def _start(view: View, kind: str, name: str, title: str) -> dict[str, Any]:
    about = f"{title}\n{view.section.title}"
    return {"kind": kind, "name": f"{view.section.slug}/{name}", "title": about}


def _point(x: float | None, figure: Figure | None, scale: float) -> tuple[float, ...] | None:
    """(x, y, low, high) of a figure."""
    if x is None or figure is None:
        return None
    edges = (figure.low, figure.high)
    low, high = (figure.value if edge is None else edge for edge in edges)
    return x, scale * figure.value, scale * low, scale * high


def _series(
    view: View,
    x: Callable[[Row], float | None],
    y: Callable[[Row], Figure | None],
    scale: float = 1.0,
    rows: Sequence[Row] | None = None,
) -> list[dict[str, Any]]:
    """A line per method over its budgets; the full cache is a line of its own."""
    rows = view.rows if rows is None else rows
    made = []
    for method in dict.fromkeys(row[0] for row in rows):
        points = [_point(x(row), y(row), scale) for row in rows if row[0] == method]
        found = sorted(point for point in points if point is not None)
        if found:
            made.append({"method": method, "points": found})
    return made


def _share(view: View, tasks: Sequence[str]) -> Callable[[Row], float | None]:
    def x(row: Row) -> float | None:
        held = view.memory(tasks, row)
        return None if held is None else 100 * held[1]

    return x


def _accuracy(view: View) -> Picture:
    """The mean score over everything against measured bytes."""

    def x(row: Row) -> float | None:
        held = view.memory(view.tasks, row)
        return None if held is None else held[0] / 2**20

    def y(row: Row) -> Figure | None:
        own = view.tasks_with_score(view.tasks, row)
        return view.mean(own, row) if len(own) == len(whole) else None

    whole = view.tasks_with_score(view.tasks, FULL) or view.tasks
    of = whole[0] if len(whole) == 1 else f"{len(whole)} tasks"
    title = f"Mean score of {of} against the memory held; 95 % intervals"
    start = _start(view, "lines", "accuracy", title)
    axes = {"x": "held after the prompt, measured [MiB]", "y": "mean score [0 to 100]"}
    return start | axes | {"log_x": True, "series": _series(view, x, y, 100)}


def _changes(view: View) -> list[Picture]:
    """(P_c - P_full) / P_full against the share held, for every benchmark."""
    made = []
    for name, tasks in benchmarks(view).items():
        rows = [row for row in view.rows if row != FULL]
        own = _series(view, _share(view, tasks), _change_of(view, tasks), 100, rows)
        title = f"{name}: change against the full cache, (P_c - P_full) / P_full; 95 % intervals"
        start = _start(view, "lines", f"change-{_slug(name)}", title)
        axes = {"x": HELD, "y": "change of the score [%]", "log_x": True, "level": 0.0}
        made.append(start | axes | {"series": own})
    return made


def _change_of(view: View, tasks: Sequence[str]) -> Callable[[Row], Figure | None]:
    return lambda row: view.change(tasks, row)


def _fidelity(view: View) -> list[Picture]:
    """KL and loss against the share held."""
    x, rows = _share(view, view.tasks), [row for row in view.rows if row != FULL]
    kls = {row: view.mean(view.tasks, row, "kl") for row in rows}
    none = [row for row, kl in kls.items() if kl is not None and kl.value <= 0]
    kl = _series(view, x, kls.get, rows=[row for row in rows if row not in none])
    loss = _series(view, x, lambda row: view.rise(view.tasks, row), rows=rows)
    tokens = "nats per token of the right answer; 95 % intervals"
    zero = f"; exactly 0 and below the axis {_list_methods(none)}" if none else ""
    first = _start(view, "lines", "kl", f"KL divergence from the full cache, {tokens}{zero}")
    second = _start(view, "lines", "loss", f"Loss above the full cache's, {tokens}")
    axes = {"x": HELD, "log_x": True}
    return [
        first | axes | {"y": "KL to the full cache [nats]", "log_y": True, "series": kl},
        second | axes | {"y": "loss above full [nats]", "level": 0.0, "series": loss},
    ]


def _list_methods(rows: Sequence[Row]) -> str:
    """Methods by budget."""
    keeps = dict.fromkeys(keep for _, keep in rows)
    methods = {keep: [method for method, own in rows if own == keep] for keep in keeps}
    return "; ".join(f"at {keep}: {', '.join(names)}" for keep, names in methods.items())


def _grids(view: View) -> list[Picture]:
    """Heat maps of needles: a panel per method, a picture per task and budget."""
    made = []
    for task in view.grids:
        groups = [line.group for line in view.section.lines if line.task == task]
        lengths, depths = (
            sorted({group[name] for group in groups}) for name in ("length", "depth")
        )
        for keep in view.keeps:
            panels = []
            for row in [FULL, *(row for row in view.rows if row[1] == keep)]:
                cells = [[_at(view, task, row, n, depth) for n in lengths] for depth in depths]
                mean = view.cell(task, row)
                if mean is not None:
                    label = f"{row[0]}: {100 * mean:.0f}"
                    panels.append({"title": label, "cells": cells})
            start = _start(view, "heat", f"{_slug(task)}-{_slug(keep)}", f"{task}, keep {keep}")
            axes = {
                "x": "length [tokens]",
                "y": "depth of the needle [% of the text]",
                "xs": lengths,
                "ys": depths,
            }
            shown = panels if len(panels) > 1 else []
            made.append(start | axes | {"z": "score [0 to 100]", "panels": shown})
    return made


def _at(view: View, task: str, row: Row, length: Any, depth: Any) -> float | None:
    here = {"length": length, "depth": depth}
    own = view.cell(task, row, lambda line: here.items() <= dict(line.group).items())
    return None if own is None else 100 * own


def _matrices(view: View) -> list[Picture]:
    """Methods by tasks, one picture per budget, for RULER and LongBench."""
    made = []
    for name, family, order in (
        ("RULER", families.ruler, families.RULER_TASKS),
        ("LongBench", families.longbench, families.LONGBENCH_TASKS),
    ):
        found = view.tasks_by_name(family)
        columns = [task for task in order if task in found]
        for keep in view.keeps if len(columns) > 1 else []:
            rows = [FULL, *(row for row in view.rows if row[1] == keep)]
            cells = [[_mean(view, found[task], row) for task in columns] for row in rows]
            start = _start(view, "matrix", f"{_slug(name)}-{_slug(keep)}", f"{name}, keep {keep}")
            labels = {"columns": columns, "rows": [row[0] for row in rows]}
            made.append(start | labels | {"z": "score [0 to 100]", "panels": cells})
    return made


def _mean(view: View, task: str, row: Row) -> float | None:
    own = view.cell(task, row)
    return None if own is None else 100 * own


def _shots(view: View) -> list[Picture]:
    """GSM8K by the number of worked examples, one picture per budget."""
    made = []
    for keep in view.keeps if len(view.shots) > 1 else []:
        series = []
        for row in [FULL, *(row for row in view.rows if row[1] == keep)]:
            points = [_point(n, view.mean([task], row), 100) for n, task in view.shots.items()]
            found = [point for point in points if point is not None]
            series += [{"method": row[0], "points": found}] if found else []
        title = f"GSM8K by worked examples in the prompt, keep {keep}; 95 % intervals"
        start = _start(view, "lines", f"gsm8k-{_slug(keep)}", title)
        axes = {"x": "worked examples in the prompt", "y": "exact match [0 to 100]"}
        made.append(start | axes | {"series": series, "ticks": list(view.shots)})
    return made


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.lower()).strip("-")
