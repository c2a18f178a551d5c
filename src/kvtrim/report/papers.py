"""A paper's table drawn from our runs, in the paper's shape, and what differs from the paper."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kvtrim.papers.recipe import Recipe, paper_model, short_model
from kvtrim.report import evaluation, families, papers_speed
from kvtrim.report.format import Cells, Column
from kvtrim.report.lookup import FULL, Row, View, rounded_budget, size_of
from kvtrim.report.published_scores import (
    Printed,
    cut_mark,
    differences,
    find_task,
    mostly_cut,
    recipe_scores,
    task_differences,
)
from kvtrim.report.results import Section, SpeedRun, across_lengths
from kvtrim.report.tables import MISSING, Table, keep, score, section_table

_HEAD: list[Column] = [("keep", "right"), ("method", "left"), ("whose", "left")]
_OURS, _THEIRS = "ours", "published"
_ALL = "average"


@dataclass(frozen=True)
class Drawn:
    """One table, and in what it is not the paper's."""

    table: Table
    differences: Sequence[str]


def draw(
    recipe: Recipe,
    sections: Sequence[Section],
    speeds: Sequence[SpeedRun],
    tasks: Sequence[str] = (),
) -> list[Drawn]:
    """The tables of everything measured for a recipe.

    Args:
        tasks: of the recipe, one by one: those that were not measured are said, and what has none
            of them is left out.
    """
    if recipe.kind == "speed":
        return [
            Drawn(*each)
            for run in speeds
            if not run.is_search
            for each in papers_speed.draw(recipe, run)
        ]
    found = []
    for section in across_lengths(sections, lambda task: task.startswith("niah")):
        view = View(section)
        if tasks and not any(_is_among(task, tasks) for task in view.tasks):
            continue
        whole = _draw_scores(recipe, view, tasks)
        grids = [
            Drawn(
                replace(grid, title=f"{recipe.name}, {section.model}: {grid.title}"),
                whole.differences,
            )
            for grid in (evaluation.lengths(view), evaluation.depths(view))
            if grid and grid.cells.rows
        ]
        found += grids or [whole]
        if any(_by_category(one) for one in recipe_scores(recipe)):
            found.append(_draw_categories(recipe, view))
    return found


def tables_in_print(recipe: Recipe) -> list[Table]:
    """What the paper prints, for each of its models."""
    by_model: dict[tuple[str, bool], list[Printed]] = {}
    for one in recipe_scores(recipe):
        by_model.setdefault((one.model, _by_category(one)), []).append(one)
    made = papers_speed.tables_in_print(recipe)
    for (model, _), own in by_model.items():
        tasks = list(dict.fromkeys(_column_of(one) for one in own))
        rows: dict[tuple[str, float, str], dict[str, str]] = {}
        for one in own:
            rows.setdefault((one.kind, one.amount, one.method), {})[_column_of(one)] = _value(one)
        shown = [
            [_say_budget(kind, amount), method, *(values.get(task, MISSING) for task in tasks)]
            for (kind, amount, method), values in rows.items()
        ]
        columns = [*_HEAD[:2], *((task, "right") for task in tasks)]
        about = f"As {recipe.title} prints it. A question mark: known or likely to be wrong there."
        title = f"{recipe.name}, {model}: {recipe.about}"
        made.append(
            Table(f"{recipe.name}/{short_model(model)}", title, about, Cells(columns, shown))
        )
    return made


def _column_of(one: Printed) -> str:
    return f"{one.task}, {one.shots} shots" if one.shots else one.task


def _say_budget(kind: str, amount: float) -> str:
    return {"full": "all", "tokens": f"{amount:.0f}"}.get(kind, f"{100 * amount:.4g}%")


def _draw_scores(recipe: Recipe, view: View, tasks: Sequence[str]) -> Drawn:
    """Rows of a budget and method, ours above the paper's where that is of the same settings."""
    told = differences(view, recipe)
    theirs = {} if told else _figures_in_print(recipe, view)
    columns = [*_HEAD, *((name, "right") for name in _shorten(view.tasks)), (_ALL, "right")]
    rows: list[list[str]] = []
    for method, row in _rows(recipe, view):
        scored = view.tasks_with_score(view.tasks, row)
        own = [_ours(view, task, row) for task in view.tasks]
        mean = score(view.mean(scored, row)) if len(scored) == len(view.tasks) else MISSING
        rows.append([keep(row), method, _OURS, *own, mean])
        values = theirs.get(row, {})
        if values:
            other = [values.get(task, MISSING) for task in [*view.tasks, _ALL]]
            rows.append([keep(row), method, _THEIRS, *other])
    about = f"{recipe.title}: {recipe.about}. Scores of 0 to 100, ours with 95 % intervals."
    title = f"{recipe.name}, {view.section.model}"
    table = section_table(view, recipe.id, title, about, Cells(columns, rows))
    notes = [f"{name}: {text}" for name, text in recipe.notes.items()]
    notes += _list_refusals(view)
    absent = _list_absent(recipe, view, tasks)
    return Drawn(table, [*told, *task_differences(view), *absent, *notes])


def _shorten(tasks: Sequence[str]) -> list[str]:
    """Headings: what all names of tasks begin with is left out, as the papers' tables do."""
    parts = [task.split("-") for task in tasks]
    shared = 0
    if len(parts) > 1:
        most = min(map(len, parts)) - 1
        shared = next((n for n in range(most) if len({one[n] for one in parts}) > 1), most)
    return ["-".join(one[shared:]) for one in parts]


def _list_refusals(view: View) -> list[str]:
    """What could not be measured, once for each reason."""
    refused, met = evaluation.refusals(view), {}
    for task, method, kept, _, _, reason in refused.cells.rows if refused else []:
        met.setdefault(reason, {}).setdefault(task, []).append(f"{method} {kept}")
    every = len(view.rows)
    return [
        f"refused: {task}, {'every method' if len(cells) == every else '; '.join(cells)}: {reason}"
        for reason, tasks in met.items()
        for task, cells in tasks.items()
    ]


def _by_category(one: Printed) -> bool:
    """Whether it is of a table over LongBench's categories."""
    return set(one.tasks) <= set(families.LONGBENCH)


def _draw_categories(recipe: Recipe, view: View) -> Drawn:
    """The six categories of LongBench; published where all their tasks are measured alike."""
    told = differences(view, recipe)
    names, own = [*families.LONGBENCH], view.tasks_by_name(families.longbench)
    unlike = view.fitted | view.shortened | view.raised | mostly_cut(view).keys()
    same = {
        name
        for name, tasks in families.LONGBENCH.items()
        if all(task in own and own[task] not in unlike for task in tasks)
    }
    same |= {_ALL} if len(same) == len(names) else set()
    model, rows = paper_model(recipe, view.section.model), []
    printed = [] if told else [one for one in recipe_scores(recipe) if one.model == model]
    printed = [one for one in printed if _by_category(one) and one.task in same]
    for method, row in _rows(recipe, view):
        scored = view.tasks_with_score([*own.values()], row)
        whole = len(scored) == len(families.LONGBENCH_TASKS)
        mean = score(view.mean(scored, row)) if whole else MISSING
        rows.append([keep(row), method, _OURS, *evaluation.category_scores(view, row), mean])
        values = {
            one.task: _value(one)
            for one in printed
            if (one.label, one.kind, one.amount) == (row[0], *rounded_budget(row[1]))
        }
        if values:
            line = [values.get(name, MISSING) for name in [*names, _ALL]]
            rows.append([keep(row), method, _THEIRS, *line])
    columns = [*_HEAD, *((name, "right") for name in names), (_ALL, "right")]
    about = f"{recipe.title}: means of each category's tasks; the average is over all tasks."
    title = f"{recipe.name}, {view.section.model}: LongBench's categories"
    return Drawn(section_table(view, "categories", title, about, Cells(columns, rows)), ())


def _value(one: Printed) -> str:
    """A published score; a question mark where the source is known or likely to have it wrong."""
    return f"{one.value:.2f}{'?' * one.doubtful}"


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
    rows = {(row[0], *rounded_budget(row[1])): row for row in view.rows}
    for one in recipe_scores(recipe):
        row = rows.get((one.label, one.kind, one.amount))
        if row is None or one.model != model:
            continue
        value = _value(one)
        if one.task == _ALL:
            tasks = [find_task(view, task, one) for task in one.tasks]
            if set(tasks) == set(view.tasks):
                found.setdefault(row, {})[_ALL] = value
        elif (task := find_task(view, one.task, one)) is not None:
            found.setdefault(row, {})[task] = value
    return found


def _is_among(task: str, tasks: Sequence[str]) -> bool:
    """Whether it is one of them or a variant of one: longgenbench-gsm8k-5."""
    return any(task == own or task.startswith(f"{own}-") for own in tasks)


def _list_absent(recipe: Recipe, view: View, tasks: Sequence[str]) -> list[str]:
    """Methods, budgets and tasks of the paper that were not measured, and those beside them."""
    met = {row[0] for row in view.rows}
    found = [f"not measured: {name}" for name, text in recipe.methods.items() if text not in met]
    other = sorted(met - {*recipe.methods.values()})
    found += [f"not the paper's: {text}" for text in other]
    if other and len(other) == len(met - {FULL[0]}):
        found.append("none of its methods was measured: is this the folder of another table?")
    kept = {rounded_budget(text) for text in view.keeps}
    wanted = recipe.keeps if len(recipe.methods) > 1 else ()
    missing = [task for task in tasks if task not in view.tasks]
    found += [f"not measured: task {', '.join(missing)}"] if missing else []
    return found + [
        f"not measured: keep {text}" for text in wanted if rounded_budget(text) not in kept
    ]
