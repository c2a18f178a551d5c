"""A paper's table drawn from our runs, in the paper's shape, and what differs from the paper."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvtrim.papers.recipe import Recipe, paper_model, short_model
from kvtrim.report import evaluation, published, speed
from kvtrim.report.lookup import FULL, Row, View, budget, size_of
from kvtrim.report.published_scores import (
    Printed,
    cut_mark,
    differences,
    find_task,
    recipe_scores,
    task_differences,
)
from kvtrim.report.results import Section, SpeedRun, across_lengths
from kvtrim.report.tables import MISSING, Column, Table, keep, score, section_table

_HEAD: list[Column] = [("keep", "right"), ("method", "left"), ("whose", "left")]
_OURS, _THEIRS = "ours", "published"
_ALL = "average"


@dataclass(frozen=True)
class Drawn:
    """One table, and in what it is not the paper's."""

    table: Table
    differences: Sequence[str]


def draw(recipe: Recipe, sections: Sequence[Section], speeds: Sequence[SpeedRun]) -> list[Drawn]:
    """The tables of everything measured for a recipe."""
    if recipe.kind == "speed":
        return [_draw_speed(recipe, run) for run in speeds]
    found = []
    for section in across_lengths(sections, lambda task: task.startswith("niah")):
        view = View(section)
        drawn = [_draw_scores(recipe, view)]
        for grid in (evaluation.lengths(view), evaluation.depths(view)):
            drawn += [Drawn(grid, drawn[0].differences)] if grid and grid.rows else []
        found += drawn[1:] or drawn
    return found


def tables_in_print(recipe: Recipe) -> list[Table]:
    """What the paper prints, for each of its models."""
    by_model: dict[str, list[Printed]] = {}
    for one in recipe_scores(recipe):
        by_model.setdefault(one.model, []).append(one)
    made = []
    for model, own in by_model.items():
        tasks = list(dict.fromkeys(_column_of(one) for one in own))
        rows: dict[tuple[str, float, str], dict[str, str]] = {}
        for one in own:
            cell = f"{one.value:.2f}{'?' * one.doubtful}"
            rows.setdefault((one.kind, one.amount, one.method), {})[_column_of(one)] = cell
        cells = [
            [_say_budget(kind, amount), method, *(values.get(task, MISSING) for task in tasks)]
            for (kind, amount, method), values in rows.items()
        ]
        columns = [*_HEAD[:2], *((task, "right") for task in tasks)]
        about = f"As {recipe.title} prints it. A question mark: known or likely to be wrong there."
        title = f"{recipe.name}, {model}: {recipe.about}"
        made.append(Table(f"{recipe.name}/{short_model(model)}", title, about, columns, cells))
    return made


def _column_of(one: Printed) -> str:
    return f"{one.task}, {one.shots} shots" if one.shots else one.task


def _say_budget(kind: str, amount: float) -> str:
    return {"full": "all", "tokens": f"{amount:.0f}"}.get(kind, f"{100 * amount:.4g}%")


def _draw_scores(recipe: Recipe, view: View) -> Drawn:
    """Rows of a budget and method, ours above the paper's where that is of the same settings."""
    told = differences(view, recipe)
    theirs = {} if told else _figures_in_print(recipe, view)
    columns = [*_HEAD, *((task, "right") for task in view.tasks), (_ALL, "right")]
    cells: list[list[str]] = []
    for method, row in _rows(recipe, view):
        scored = view.tasks_with_score(view.tasks, row)
        own = [_ours(view, task, row) for task in view.tasks]
        mean = score(view.mean(scored, row)) if len(scored) == len(view.tasks) else MISSING
        cells.append([keep(row), method, _OURS, *own, mean])
        values = theirs.get(row, {})
        if values:
            other = [values.get(task, MISSING) for task in [*view.tasks, _ALL]]
            cells.append([keep(row), method, _THEIRS, *other])
    about = f"{recipe.title}: {recipe.about}. Scores of 0 to 100, ours with 95 % intervals."
    table = section_table(
        view, recipe.id, f"{recipe.name}, {view.section.model}", about, columns, cells
    )
    notes = [f"{name}: {text}" for name, text in recipe.notes.items()]
    refused = evaluation.refusals(view)
    notes += [f"refused: {', '.join(row)}" for row in (refused.rows if refused else [])]
    return Drawn(table, [*told, *task_differences(view), *_list_absent(recipe, view), *notes])


def _ours(view: View, task: str, row: Row) -> str:
    found = view.mean([task], row) if view.values(task, row) else None
    return score(found) + cut_mark(view, [task], row) if found else MISSING


def _rows(recipe: Recipe, view: View) -> list[tuple[str, Row]]:
    """What was measured, by budget, the smallest first, and in the paper's order of methods."""
    order = {label: place for place, label in enumerate(recipe.methods.values())}
    names = {label: name for name, label in recipe.methods.items()}
    rows = sorted(
        view.rows, key=lambda row: (row != FULL, size_of(row[1]), order.get(row[0], len(order)))
    )
    return [(names.get(row[0], row[0]), row) for row in rows]


def _figures_in_print(recipe: Recipe, view: View) -> Mapping[Row, Mapping[str, str]]:
    """The paper's figures by our row and task."""
    model, found = paper_model(recipe, view.section.model), {}
    rows = {(row[0], *_amount(row)): row for row in view.rows}
    for one in recipe_scores(recipe):
        row = rows.get((one.label, one.kind, one.amount))
        if row is None or one.model != model:
            continue
        value = f"{one.value:.2f}{'?' * one.doubtful}"
        if one.task == _ALL:
            tasks = [find_task(view, task, one) for task in one.tasks]
            if set(tasks) == set(view.tasks):
                found.setdefault(row, {})[_ALL] = value
        elif (task := find_task(view, one.task, one)) is not None:
            found.setdefault(row, {})[task] = value
    return found


def _amount(row: Row) -> tuple[str, float]:
    kind, amount = budget(row[1])
    return kind, round(amount, 6)


def _list_absent(recipe: Recipe, view: View) -> list[str]:
    """Methods, budgets and tasks of the paper that were not measured, and those beside them."""
    met = {row[0] for row in view.rows}
    found = [f"not measured: {name}" for name, text in recipe.methods.items() if text not in met]
    found += [f"not the paper's: {text}" for text in sorted(met - {*recipe.methods.values()})]
    kept = {_amount(("", text)) for text in view.keeps}
    wanted = recipe.keeps if len(recipe.methods) > 1 else ()
    return found + [
        f"not measured: keep {text}" for text in wanted if _amount(("", text)) not in kept
    ]


def _draw_speed(recipe: Recipe, run: SpeedRun) -> Drawn:
    """Seconds and bytes, and the paper's times as ratios where it is FastKV's."""
    rows = speed.rows(run.lines, run.record["limits"])
    columns, cells = speed.table(rows)
    model = str(run.record["model"]["name"])
    told = [] if paper_model(recipe, model) in recipe.models else [f"the model: {model} here"]
    met = sorted({row["length"] for row in rows})
    if met != sorted(recipe.lengths):
        told.append(f"lengths: {met} here, {list(recipe.lengths)} there")
    told.append("seconds of other machines do not compare: look at ratios to the full cache")
    if recipe.tables:
        beside = published.cells(run.record["model"], rows, only_measured=True)
        told += [" | ".join(line) for line in beside]
    title = f"{recipe.name}, {model}: {recipe.about}"
    return Drawn(Table(recipe.name, title, speed.title(run.record), columns, cells), told)
