"""Benchmarks as data: rows, prompts, scorers. Strings only: no model, no tensors."""

from collections.abc import Iterable, Mapping

from kvtrim.errors import UnknownNameError
from kvtrim.methods import entry_points
from kvtrim.tasks import (
    choices,
    gsm8k,
    humaneval,
    jailbreak,
    longbench,
    longgenbench,
    niah,
    ruler,
)
from kvtrim.tasks.base import Request, Sample, Task

__all__ = ["GROUPS", "TASKS", "Request", "Sample", "Task", "find_tasks", "places"]

_GROUP = "kvtrim.tasks"
_MODULES = (longbench, ruler, niah, gsm8k, choices, humaneval, longgenbench, jailbreak)
TASKS: Mapping[str, Task] = {task.name: task for module in _MODULES for task in module.TASKS}
"""Every benchmark by its name."""
GROUPS: Mapping[str, tuple[str, ...]] = {
    "longbench": tuple(task.name for task in longbench.TASKS),
    "ruler": tuple(task.name for task in ruler.TASKS),
    "ruler-needles": tuple(f"ruler-niah-{name}" for name in ruler.NEEDLES),
    "ruler-offline": tuple(task.name for task in ruler.OFFLINE),
    "needles": tuple(task.name for task in niah.TASKS),
    "gsm8k": tuple(task.name for task in gsm8k.TASKS),
    "mmlu": ("mmlu-0", "mmlu-5"),
    "csqa": ("csqa-0", "csqa-4"),
    "longgenbench": tuple(task.name for task in longgenbench.TASKS),
    "kvfundabench": (
        "mmlu-5",
        "csqa-4",
        "gsm8k-8",
        "gsm8k-50",
        "humaneval-8",
        "longgenbench-gsm8k",
        "jailbreakv-8",
    ),
}
"""Names for several benchmarks at once."""


def find_tasks(names: Iterable[str]) -> list[Task]:
    """The benchmarks of these names, each once, in the order asked for.

    Args:
        names: of a benchmark or a group of them, of one that an installed package offers, or
            `module:ATTRIBUTE` of your own.

    Raises:
        UnknownNameError: a name that is none of these.
        UsageError: what is not kvtrim's own cannot be loaded, or has a name that is taken.
    """
    found: dict[str, Task] = {}
    for name in names:
        found |= {task.name: task for task in _find(name)}
    return list(found.values())


def places(names: Iterable[str]) -> tuple[str, ...]:
    """Those of the names that do not come with kvtrim, as `module:ATTRIBUTE`."""
    return entry_points.places(_GROUP, names)


def _find(name: str) -> list[Task]:
    if ":" in name:
        return [entry_points.import_object(name, Task)]
    other = entry_points.find_offer(_GROUP, name, Task, {*TASKS, *GROUPS})
    if other is not None:
        return [other]
    if name not in TASKS and name not in GROUPS:
        raise UnknownNameError("task", name, {*TASKS, *GROUPS, *entry_points.names(_GROUP)})
    return [TASKS[one] for one in GROUPS.get(name, (name,))]


named = find_tasks
"""Its old name, for one version."""
