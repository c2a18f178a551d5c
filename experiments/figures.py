"""Figures as the experiments' tables write them."""

from collections.abc import Sequence
from math import sqrt
from statistics import mean, stdev


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard error; a dash where one value tells of no error."""
    if len(values) < 2:
        return "-"
    return f"{mean(values):.{digits}f} ± {stdev(values) / sqrt(len(values)):.{digits}f}"
