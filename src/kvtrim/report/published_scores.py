"""Scores that papers print, beside ours where everything that decides them is the paper's.

What a paper did is its recipe (`kvtrim.papers`): the model, whether methods see the question, the
chat template, where long prompts are cut, how long answers may be, examples, lengths, and each
method with its parameters. One difference, and no published figure stands beside ours. Prompts
that our model's window or --length cut are counted in the cell, and a task of which more than a
tenth were cut stands alone.

The files in `papers/` hold what the sources print, nothing corrected; figures that a source is
known or likely to have wrong are marked.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import inf
from typing import Any

from kvtrim.papers.recipe import Recipe, paper_model, recipes, short_model
from kvtrim.report import families
from kvtrim.report.format import Cells, Column
from kvtrim.report.lookup import FULL, Row, View, rounded_budget
from kvtrim.report.tables import MISSING, Table, keep, score, section_table

_TASKS = {  # ours begins with: theirs
    "mmlu": "mmlu",
    "csqa": "commonsenseqa",
    "commonsenseqa": "commonsenseqa",
    "humaneval": "humaneval",
    "longgenbench": "longgenbench_gsm8k",
}  # not jailbreakv, whose answers others judge in another way
_SPECIAL = 16  # tokens by which a prompt may be shorter than the length it was cut to
_COLUMNS: list[Column] = [("task", "left"), ("method", "left"), ("keep", "right")]
_COLUMNS += [("ours", "right"), ("published", "right"), ("source", "left"), ("but", "left")]


@dataclass(frozen=True)
class Printed:
    """One figure of a source."""

    recipe: Recipe
    model: str
    task: str  # "average" of the tasks in `tasks`
    tasks: tuple[str, ...]
    shots: int | None
    length: int | None  # tokens of its prompts, where they are made to a length
    method: str  # as the paper calls it, or its variant of one
    label: str  # ours
    kind: str  # of the budget: tokens, share, full
    amount: float
    value: float  # 0 to 100
    source: str
    doubtful: bool


@cache
def printed_scores() -> tuple[Printed, ...]:
    """Every score of every source; one that is printed twice counts once."""
    met: dict[Any, Printed] = {}
    for recipe in recipes():
        for one in recipe_scores(recipe):
            how = one.model, one.task, one.shots, one.length
            key = recipe.paper, *how, one.method, one.kind, one.amount, one.value
            met.setdefault(key, one)
    return tuple(met.values())


def recipe_scores(recipe: Recipe) -> Iterator[Printed]:
    """The scores that a paper's table prints."""
    for table in recipe.tables:
        for row in table["rows"]:
            if "scores" in row and table.get("model") is not None:
                yield from _row(recipe, table, row)


def _cite(recipe: Recipe, table: Mapping[str, Any]) -> str:
    """Paper and table: FastKV (arXiv 2502.01068), Table 2."""
    where = f" (arXiv {recipe.arxiv})" if recipe.arxiv else ""
    shots = f", {table['shots']} shots" if table.get("shots") else ""
    return f"{recipe.title}{where}, {table['caption'].partition(':')[0]}{shots}"


def _row(recipe: Recipe, table: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[Printed]:
    method = row.get("variant", row["method"])
    if method not in recipe.methods:  # rows that say what a variant of the prompts gives
        return
    scale = 100 if table["unit"] == "fraction_0_1" else 1
    kind, amount = _amount(row["budget"])
    tasks, doubt = tuple(row["scores"]), row.get("suspect", ())
    values = {**row["scores"], "average": row.get("average")}
    for task, value in values.items():
        if value is None or (task == "average" and len(tasks) < 2):
            continue
        yield Printed(
            recipe=recipe,
            model=table["model"],
            task=task,
            tasks=tasks,
            shots=table.get("shots"),
            length=table.get("length"),
            method=method,
            label=recipe.methods[method],
            kind=kind,
            amount=amount,
            value=round(scale * value, 4),
            source=_cite(recipe, table),
            doubtful=("average" if task == "average" else "scores") in doubt,
        )


def _amount(given: Mapping[str, Any]) -> tuple[str, float]:
    """Kind and amount of a budget, as `lookup.budget` has them."""
    kind = given["kind"]
    if kind == "full":
        return "full", 1.0
    value = float(given["value"])
    if kind == "tokens":
        return "tokens", value
    return "share", round(value if kind == "ratio_kept" else 1 - value, 6)


def beside(view: View) -> Table:
    """Our figure beside every published one whose settings are ours."""
    model, rows = short_model(view.section.model), []
    same = {one.name: not differences(view, one) for one in recipes()}
    for one in printed_scores():
        if short_model(one.model) == model and same[one.recipe.name]:
            for row in view.rows:
                if (row[0], *rounded_budget(row[1])) == (one.label, one.kind, one.amount):
                    rows += _compare(view, one, row)
    about = (
        "Published figures are what the sources print, measured there with other code, on other "
        "machines and on all samples. They stand here only where model, protocol, template, cut, "
        "answer length, examples, method with its parameters, and budget are the paper's. A "
        "question mark: the source is known or likely to have this figure wrong. But: in what its "
        "method is not ours."
    )
    return section_table(view, "published", "Published beside ours", about, Cells(_COLUMNS, rows))


def differences(view: View, recipe: Recipe) -> list[str]:
    """In what a section was measured otherwise than a paper's table, whatever the method."""
    found, section = [], view.section
    name = paper_model(recipe, section.model)
    if name not in recipe.models:
        found.append(f"the model: {section.model} here, {', '.join(recipe.models)} there")
    if section.protocol != recipe.protocol:
        found.append(f"the protocol: {section.protocol} here, {recipe.protocol} there")
    for chat, cut in dict.fromkeys(_cut_and_chat(run.record) for run in section.runs):
        if chat != recipe.chat:
            ours, theirs = _template(chat), _template(recipe.chat)
            found.append(f"the chat template: {ours} here, {theirs} there")
        own = recipe.truncation(name)
        if cut != own and (cut is not None or _reaches(view, own)):
            found.append(f"long prompts: cut at {cut or 'the window'} here, at {own} tokens there")
    lengths = {run.record.get("length") for run in section.runs}
    if recipe.lengths and lengths != {*recipe.lengths}:
        here = ", ".join(f"{length}" for length in sorted(filter(None, lengths))) or "the usual"
        found.append(f"lengths: {here} here, {', '.join(map(str, recipe.lengths))} there")
    return found


def task_differences(view: View) -> list[str]:
    """In what single tasks were measured otherwise, beside which nothing published stands."""
    told = [
        (view.fitted, "of samples that did not have to be cut alone"),
        (view.shortened, "with shorter answers than the task allows"),
        (view.raised, "with longer answers than the task allows"),
    ]
    found = [f"{what}: {', '.join(sorted(tasks))}" for tasks, what in told if tasks]
    cut = [f"{task} ({n} of {many})" for task, (n, many) in mostly_cut(view).items()]
    found += [f"prompts cut by --length or the window: {', '.join(cut)}"] if cut else []
    limits = dict.fromkeys(run.record.get("limit") for run in view.section.runs)
    return found + [f"samples: at most {limit} of a task" for limit in limits if limit]


def _cut_and_chat(record: Mapping[str, Any]) -> tuple[Any, Any]:
    return record.get("chat"), record.get("truncate_at")


def _template(chat: bool | None) -> str:
    return {None: "as each task has it", True: "always", False: "never"}[chat]


def _reaches(view: View, bound: int | None) -> bool:
    """Whether a prompt is so long that a cut at this length would have changed it."""
    if bound is None:
        return False
    sizes = (line.figure("prompt_tokens") or 0 for line in view.section.lines)
    return any(size > bound for size in sizes)


def _compare(view: View, one: Printed, row: Row) -> list[list[str]]:
    """The line of one published figure, if we have the same."""
    if one.task == "average":
        found = [find_task(view, task, one) for task in one.tasks]
        tasks = [task for task in found if task is not None]
        if len(tasks) < len(one.tasks):
            return []
        label = f"average of {len(tasks)}"
    else:
        task = find_task(view, one.task, one)
        if task is None:
            return []
        tasks, label = [task], task
    own = (
        score(view.mean(tasks, row))
        if len(view.tasks_with_score(tasks, row)) == len(tasks)
        else MISSING
    )
    if own == MISSING:
        return []
    value = f"{one.value:.2f}{'?' if one.doubtful else ''}"
    but = one.recipe.notes.get(one.method, "")
    return [[label, row[0], keep(row), own + cut_mark(view, tasks, row), value, one.source, but]]


def cut_mark(view: View, tasks: list[str], row: Row = FULL) -> str:
    """How many of these tasks' prompts lost their middle, unless it was cut as the paper cuts.

    Not in the cells of a task of which more were cut: `task_differences` says that.
    """
    cut, many = _count_cut(view, tasks, row)
    return f", {cut} of {many} prompts cut" if cut and not _mostly(cut, many) else ""


def mostly_cut(view: View) -> dict[str, tuple[int, int]]:
    """Tasks that no longer ask what a paper's do, how many of their prompts were cut, of how many.

    Those of which more than a tenth lost their middle to --length or the window.
    """
    counted = {task: _count_cut(view, [task]) for task in view.tasks}
    return {task: (cut, many) for task, (cut, many) in counted.items() if _mostly(cut, many)}


def _count_cut(view: View, tasks: list[str], row: Row = FULL) -> tuple[int, int]:
    """How many prompts lost their middle to --length or the window, of how many."""
    asked = [run.record.get("truncate_at") for run in view.section.runs]
    bound = min((each for each in asked if each), default=inf) - _SPECIAL
    lines = [line for task in tasks for line in view.lines(task, row)]
    cut = [line for line in lines if line.truncated]
    return sum((line.figure("prompt_tokens") or 0) < bound for line in cut), len(lines)


def _mostly(cut: int, many: int) -> bool:
    return 10 * cut > many


def find_task(view: View, task: str, one: Printed) -> str | None:
    """Our task that asks the same as a source's, of samples that were not chosen by length."""
    shots, ruled = one.shots or 0, view.tasks_by_name(families.ruler)
    if task in ruled:
        return ruled[task] if view.section.length == str(one.length) else None
    if task in ("gsm8k", "manyshot_gsm8k"):
        own = view.shots.get(shots)
    else:
        known = view.tasks_by_name(families.longbench)
        for name in view.others:
            for begin, theirs in _TASKS.items():
                wanted = 0 if begin == "longgenbench" else shots  # a number there says problems
                if name.startswith(begin) and _shots(name) == wanted:
                    known.setdefault(theirs, name)
        own = known.get(task)
    if own is None or own in view.fitted | view.shortened | view.raised:
        return None
    return None if _mostly(*_count_cut(view, [own])) else own


def _shots(task: str) -> int:
    """Worked examples in a task's prompts, as its name says them: mmlu-5; else none."""
    end = task.rpartition("-")[2]
    return int(end) if end.isdigit() else 0
