"""What scores say: means, standard errors and 95 % bootstrap intervals, of one task or of several.

Intervals are percentile bootstraps: samples are drawn anew with replacement, and the middle 95 %
of what comes out of the draws is the interval. Averages over tasks draw every task's samples by
themselves, comparisons draw pairs. A single sample has no spread of its own: where a task has no
more than that, and there are enough tasks, the tasks are drawn as well. The seed is fixed and
samples are sorted first, so that the same ones give the same interval in whatever order they come.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from kvtrim.errors import UsageError

RESAMPLES = 10_000
LEVEL = 0.95
_AT_ONCE = 2_000_000  # numbers drawn in one go
_TASKS = 4  # fewer say nothing about how tasks differ


@dataclass(frozen=True)
class Summary:
    """The mean of `n` scores; what cannot be known from so few is None."""

    n: int
    mean: float | None
    se: float | None  # standard error of the mean
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Figure:
    """A mean over tasks and what it rests on."""

    value: float
    low: float | None  # None where one sample says nothing about spread
    high: float | None
    samples: int


def mean(scores: Iterable[float]) -> float | None:
    """The mean; None of nothing."""
    values = _values(scores)
    return float(values.mean()) if len(values) else None


def standard_error(scores: Iterable[float]) -> float | None:
    """Standard deviation (n - 1) over the square root of n; None of fewer than two."""
    values = _values(scores)
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def interval(
    scores: Iterable[float], seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> tuple[float, float] | None:
    """The middle `level` of the means of samples drawn anew; None of fewer than two scores.

    Raises:
        UsageError: `level` is no share, or `resamples` not positive.
    """
    if not 0 < level < 1 or resamples < 1:
        raise UsageError(
            f"level={level}, resamples={resamples}: use a level between 0 and 1, such as "
            f"{LEVEL}, and at least one resample"
        )
    values = _values(scores)
    if len(values) < 2:
        return None
    return _middle(_resample(values[:, None], seed, 0, resamples)[:, 0], level)


def summary(scores: Iterable[float]) -> Summary:
    """Mean, standard error and interval of scores, see `interval`."""
    values = _values(scores)
    low, high = interval(values) or (None, None)
    return Summary(len(values), mean(values), standard_error(values), low, high)


def mean_of_means(tasks: Sequence[Sequence[float]]) -> Figure | None:
    """The plain mean of the tasks' means, as papers average; None of no tasks."""
    return _figure([_values(task)[:, None] for task in tasks], _average)


def mean_of_groups(groups: Sequence[Sequence[Sequence[float]]]) -> Figure | None:
    """The plain mean of groups' means, each of the means of its tasks; None of no groups."""
    tasks = [task for group in groups for task in group]
    if len(tasks) < 2:
        return mean_of_means(tasks)
    shares = np.concatenate([np.full(len(g), 1 / len(g) / len(groups)) for g in groups])
    columns = [_values(task)[:, None] for task in tasks]
    return _figure(columns, lambda means: means[..., 0] @ shares, alike=False)


def change(tasks: Sequence[Sequence[tuple[float, float]]]) -> Figure | None:
    """(P_c - P_full) / P_full of the tasks' means, from (compressed, full) of the same samples.

    None where the full cache scores nothing at all.
    """
    pairs = [np.asarray(task, float) for task in tasks]
    if not pairs or not any(task[:, 1].any() for task in pairs):
        return None
    return _figure(pairs, _relative)


def _values(scores: Iterable[float]) -> np.ndarray:
    values = np.fromiter(scores, dtype=np.float64)
    if not np.isfinite(values).all():
        raise UsageError("a score is not a finite number; leave out samples without a score")
    return np.sort(values)


def _average(means: Any) -> Any:
    return means[..., 0].mean(axis=-1)


def _relative(means: Any) -> Any:
    own, base = means[..., 0].mean(axis=-1), means[..., 1].mean(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (own - base) / base


def _figure(
    tasks: Sequence[np.ndarray], statistic: Callable[[Any], Any], alike: bool = True
) -> Figure | None:
    """A statistic of the tasks' means [..., tasks, columns], and its interval.

    Args:
        alike: it treats all tasks in the same way, so that they can be drawn.
    """
    if not tasks:
        return None
    value = float(statistic(np.stack([task.mean(axis=0) for task in tasks])))
    count = sum(len(task) for task in tasks)
    single = min(len(task) for task in tasks) < 2
    if single and not (alike and len(tasks) >= _TASKS):
        return Figure(value, None, None, count)
    drawn = np.stack([_resample(task, 0, place) for place, task in enumerate(tasks)], axis=1)
    if single:
        size = RESAMPLES, len(tasks)
        chosen = np.random.default_rng(0).integers(len(tasks), size=size)
        drawn = np.take_along_axis(drawn, chosen[..., None], axis=1)
    drawn = statistic(drawn)
    return Figure(value, *_middle(drawn[np.isfinite(drawn)], LEVEL), count)


def _middle(drawn: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resample(
    samples: np.ndarray, seed: int, place: int, resamples: int = RESAMPLES
) -> np.ndarray:
    """Means [resamples, columns] of samples [samples, columns] drawn with replacement.

    Args:
        place: of a task among others of one figure, which are drawn apart from it.
    """
    different, counts = np.unique(samples, axis=0, return_counts=True)
    return _counts(tuple(map(int, counts)), seed, place, resamples) @ different / len(samples)


@lru_cache(maxsize=32)
def _counts(counts: tuple[int, ...], seed: int, place: int, resamples: int) -> np.ndarray:
    """How often each different sample is drawn [resamples, different].

    Args:
        counts: how often each is there.
    """
    total, step = sum(counts), max(1, _AT_ONCE // len(counts))
    shares, random = np.array(counts) / total, np.random.default_rng((seed, place))
    starts = range(0, resamples, step)
    drawn = [random.multinomial(total, shares, size=min(step, resamples - at)) for at in starts]
    return np.concatenate(drawn).astype(np.float64)
