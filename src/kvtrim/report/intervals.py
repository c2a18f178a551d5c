"""Means of samples with their 95 % bootstrap intervals: of one task, over tasks, against a base.

A task's own interval is that of `statistics`. Averages over tasks draw every task's samples
by themselves, comparisons draw pairs. A single sample has no spread of its own: where a task has
no more than that, and there are enough tasks, the tasks are drawn as well. The seed is fixed, so
that the same samples always give the same interval.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy

from kvtrim.report import statistics

DRAWS, COVERED, SEED = 2000, 95.0, 0
_TASKS = 4  # fewer say nothing about how tasks differ


@dataclass(frozen=True)
class Figure:
    """A mean and what it rests on."""

    value: float
    low: float | None  # None where one sample says nothing about spread
    high: float | None
    samples: int


def mean_of_means(tasks: Sequence[Sequence[float]]) -> Figure | None:
    """The plain mean of the tasks' means, as papers average; None of no tasks."""
    if len(tasks) == 1:
        found = statistics.summary(tasks[0])
        return Figure(float(found.mean or 0), found.low, found.high, found.n)
    return _figure([numpy.asarray(task, float)[:, None] for task in tasks], _average)


def mean_of_groups(groups: Sequence[Sequence[Sequence[float]]]) -> Figure | None:
    """The plain mean of groups' means, each of the means of its tasks; None of no groups."""
    tasks = [task for group in groups for task in group]
    if len(tasks) < 2:
        return mean_of_means(tasks)
    shares = numpy.concatenate([numpy.full(len(g), 1 / len(g) / len(groups)) for g in groups])
    columns = [numpy.asarray(task, float)[:, None] for task in tasks]
    return _figure(columns, lambda means: means[..., 0] @ shares, alike=False)


def change(tasks: Sequence[Sequence[tuple[float, float]]]) -> Figure | None:
    """(P_c - P_full) / P_full of the tasks' means, from (compressed, full) of the same samples.

    None where the full cache scores nothing at all.
    """
    pairs = [numpy.asarray(task, float) for task in tasks]
    if not pairs or not any(task[:, 1].any() for task in pairs):
        return None
    return _figure(pairs, _relative)


def _average(means: Any) -> Any:
    return means[..., 0].mean(axis=-1)


def _relative(means: Any) -> Any:
    own, base = means[..., 0].mean(axis=-1), means[..., 1].mean(axis=-1)
    with numpy.errstate(divide="ignore", invalid="ignore"):
        return (own - base) / base


def _figure(
    tasks: Sequence[Any], statistic: Callable[[Any], Any], alike: bool = True
) -> Figure | None:
    """A statistic of the tasks' means [..., tasks, columns], and its interval.

    Args:
        alike: it treats all tasks in the same way, so that they can be drawn.
    """
    if not tasks:
        return None
    value = float(statistic(numpy.stack([task.mean(axis=0) for task in tasks])))
    count = sum(len(task) for task in tasks)
    single = min(len(task) for task in tasks) < 2
    if single and not (alike and len(tasks) >= _TASKS):
        return Figure(value, None, None, count)
    drawn = numpy.stack([_resampled(task, place) for place, task in enumerate(tasks)], axis=1)
    if single:
        chosen = numpy.random.default_rng(SEED).integers(len(tasks), size=(DRAWS, len(tasks)))
        drawn = numpy.take_along_axis(drawn, chosen[..., None], axis=1)
    drawn = statistic(drawn)
    drawn = drawn[numpy.isfinite(drawn)]
    edge = (100 - COVERED) / 2
    low, high = numpy.percentile(drawn, [edge, 100 - edge])
    return Figure(value, float(low), float(high), count)


def _resampled(task: Any, place: int) -> Any:
    """Means [draws, columns] of samples drawn with replacement."""
    return _weights(len(task), place) @ task


@lru_cache(maxsize=256)
def _weights(size: int, place: int) -> Any:
    """How much each sample counts in each draw [draws, size]; tasks of one average differ."""
    draw = numpy.random.default_rng((SEED, place))
    return draw.multinomial(size, numpy.full(size, 1 / size), size=DRAWS) / size
