"""Refits: what the entries that stay become, by name."""

from collections.abc import Callable, Mapping
from functools import partial

from kvtrim.methods.refit.base import Refit, Unchanged
from kvtrim.methods.refit.least_squares import LeastSquares, aim_of

REFITS: Mapping[str, Callable[[], Refit]] = {
    "none": Unchanged,
    "values": LeastSquares,
    "values+bias": partial(LeastSquares, bias=True),
}

__all__ = ["REFITS", "LeastSquares", "Refit", "Unchanged", "aim_of"]
