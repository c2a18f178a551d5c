"""Scores that papers print, beside ours where model, task, method and budget are the same.

Shots and, where prompts are made to one, their length have to be the same too; methods with
settings of their own, and tasks whose prompts were cut, are not set beside anything.

The files in `published/` hold what the sources print, nothing corrected; figures that a source is
known or likely to have wrong are marked.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from kvtrim.report import families
from kvtrim.report.lookup import Row, View, budget
from kvtrim.report.tables import MISSING, Column, Table, keep, score, section_table

_FILES = {  # file: how prompts are read there, and the short name of the source
    "fastkv-scores": ("question-aware", "FastKV"),
    "circuitkv": ("question-aware", "CircuitKV's results file"),
    "curdkv": ("question-agnostic", "CurDKV"),
    "kvfundabench": ("question-aware", "KVFundaBench"),
}
_METHODS = {"ada-snapkv": "adakv"}  # theirs: ours, where the names differ
_MODELS = {"mistral-nemo-instruct-2407": "mistral-nemo-12b-instruct"}  # the Hub's: the paper's
_TASKS = {  # ours begins with: theirs
    "mmlu": "mmlu",
    "csqa": "commonsenseqa",
    "commonsenseqa": "commonsenseqa",
    "humaneval": "humaneval",
    "longgenbench": "longgenbench_gsm8k",
}  # not jailbreakv, whose answers others judge in another way
_COLUMNS: list[Column] = [("task", "left"), ("method", "left"), ("keep", "right")]
_COLUMNS += [("ours", "right"), ("published", "right"), ("source", "left"), ("read", "left")]


@dataclass(frozen=True)
class Printed:
    """One figure of a source."""

    model: str
    task: str  # "average" of the tasks in `tasks`
    tasks: tuple[str, ...]
    shots: int | None
    length: int | None  # tokens of its prompts, where they are made to a length
    method: str
    kind: str  # of the budget: tokens, share, full
    amount: float
    value: float  # 0 to 100
    source: str
    read: str
    doubtful: bool


@cache
def printed_scores() -> tuple[Printed, ...]:
    """Every score of every source; one that is printed twice counts once."""
    met: dict[Any, Printed] = {}
    for name, (read, short) in _FILES.items():
        path = files("kvtrim") / "papers" / f"{name}.json"
        source = json.loads(path.read_text(encoding="utf-8"))
        for table in source["tables"]:
            for row in table["rows"]:
                for one in _row(table, row, _cite(short, source["source"], table), read):
                    key = (
                        name,
                        one.model,
                        one.task,
                        one.shots,
                        one.length,
                        one.method,
                        one.kind,
                        one.amount,
                    )
                    met.setdefault((*key, one.value), one)
    return tuple(met.values())


def _cite(short: str, source: Mapping[str, Any], table: Mapping[str, Any]) -> str:
    """Paper and table: FastKV (arXiv 2502.01068), Table 2."""
    where = f" (arXiv {source['arxiv']})" if source.get("arxiv") else ""
    shots = f", {table['shots']} shots" if table.get("shots") else ""
    return f"{short}{where}, {table['caption'].partition(':')[0]}{shots}"


def _row(
    table: Mapping[str, Any], row: Mapping[str, Any], source: str, read: str
) -> Iterator[Printed]:
    if "variant" in row or table.get("model") is None:
        return
    scale = 100 if table["unit"] == "fraction_0_1" else 1
    method = str(_METHODS.get(row["method"], row["method"]))
    kind, amount = _amount(row["budget"])
    tasks, doubt = tuple(row["scores"]), row.get("suspect", ())
    values = {**row["scores"], "average": row.get("average")}
    for task, value in values.items():
        if value is None or (task == "average" and len(tasks) < 2):
            continue
        wrong = ("average" if task == "average" else "scores") in doubt
        how = table.get("shots"), table.get("length")
        about = (table["model"], task, tasks, *how, method, kind, amount)
        yield Printed(*about, round(scale * value, 4), source, read, wrong)


def _amount(given: Mapping[str, Any]) -> tuple[str, float]:
    """Kind and amount of a budget, as `views.budget` has them."""
    kind = given["kind"]
    if kind == "full":
        return "full", 1.0
    value = float(given["value"])
    if kind == "tokens":
        return "tokens", value
    return "share", round(value if kind == "ratio_kept" else 1 - value, 6)


def beside(view: View) -> Table:
    """Our figure beside every published one that it can be set beside."""
    model = _model(view.section.model)
    cells = []
    for one in printed_scores():
        if _model(one.model) != model:
            continue
        for row in view.rows:
            if (row[0], *_budget(row)) == (one.method, one.kind, one.amount):
                cells += _compare(view, one, row)
    about = (
        "Published figures are what the sources print, measured there with other code, on other "
        "machines and on all samples; read says whether the source's methods saw the question. "
        "A question mark: the source is known or likely to have this figure wrong."
    )
    return section_table(view, "published", "Published beside ours", about, _COLUMNS, cells)


def _compare(view: View, one: Printed, row: Row) -> list[list[str]]:
    """The line of one published figure, if we have the same."""
    if one.task == "average":
        found = [_ours(view, task, one) for task in one.tasks]
        tasks = [task for task in found if task is not None]
        if len(tasks) < len(one.tasks):
            return []
        label = f"average of {len(tasks)}"
    else:
        task = _ours(view, one.task, one)
        if task is None:
            return []
        tasks, label = [task], task
    own = (
        score(view.mean(tasks, row))
        if len(view.tasks_with_score(tasks, row)) == len(tasks)
        else MISSING
    )
    value = f"{one.value:.2f}{'?' if one.doubtful else ''}"
    line = [label, row[0], keep(row), own, value, one.source, one.read]
    return [] if own == MISSING else [line]


def _ours(view: View, task: str, one: Printed) -> str | None:
    """Our task that asks the same as a source's; nothing was cut from samples or answers."""
    shots, ruled = one.shots or 0, view.tasks_by_name(families.ruler)
    if task in ruled:
        same = view.section.length == str(one.length)
        return ruled[task] if same and ruled[task] not in view.cut | view.shortened else None
    if task in ("gsm8k", "manyshot_gsm8k"):
        own = view.shots.get(shots)
    else:
        known = view.tasks_by_name(families.longbench)
        for name in view.others:
            for begin, theirs in _TASKS.items():
                if name.startswith(begin) and _shots(name) == shots:
                    known.setdefault(theirs, name)
        own = known.get(task)
    return None if own in view.cut | view.fitted | view.shortened else own


def _shots(task: str) -> int:
    """Worked examples in a task's prompts, as its name says them: mmlu-5; else none."""
    end = task.rpartition("-")[2]
    return int(end) if end.isdigit() else 0


def _budget(row: Row) -> tuple[str, float]:
    kind, amount = budget(row[1])
    return kind, round(amount, 6)


def _model(name: str) -> str:
    """A model's name without owner and company: llama-3.1-8b-instruct."""
    short = name.rstrip("/").rpartition("/")[2].lower().removeprefix("meta-")
    return _MODELS.get(short, short)
