"""What a handful of scores says: their mean, its standard error and an interval around it.

Intervals are percentile bootstraps: samples are drawn anew with replacement, and the middle 95 %
of the means that come out is the interval. The same scores and seed give the same interval, in
whatever order the scores come. One score has a mean, but neither error nor interval; no score has
none of them. How two methods are compared, sample by sample: `intervals.change`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from kvtrim.errors import UsageError

RESAMPLES = 10_000
LEVEL = 0.95
_AT_ONCE = 2_000_000  # numbers drawn in one go


@dataclass(frozen=True)
class Summary:
    """The mean of `n` scores; what cannot be known from so few is None."""

    n: int
    mean: float | None
    se: float | None  # standard error of the mean
    low: float | None
    high: float | None


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
    means = _means(values, np.random.default_rng(seed), resamples)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summary(
    scores: Iterable[float], seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> Summary:
    """Mean, standard error and interval of scores, see `interval`."""
    values = _values(scores)
    low, high = interval(values, seed, resamples, level) or (None, None)
    return Summary(len(values), mean(values), standard_error(values), low, high)


def _values(scores: Iterable[float]) -> np.ndarray:
    values = np.fromiter(scores, dtype=np.float64)
    if not np.isfinite(values).all():
        raise UsageError("a score is not a finite number; leave out samples without a score")
    return np.sort(values)


def _means(values: np.ndarray, random: np.random.Generator, resamples: int) -> np.ndarray:
    """Means of samples drawn anew, by how often each different score is drawn."""
    different, counts = np.unique(values, return_counts=True)
    shares, step = counts / len(values), max(1, _AT_ONCE // len(different))
    means = []
    for start in range(0, resamples, step):
        drawn = random.multinomial(len(values), shares, size=min(step, resamples - start))
        means.append(drawn @ different / len(values))
    return np.concatenate(means)
