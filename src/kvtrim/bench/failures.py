"""What an error means for a figure that was to be measured: refused, out of memory, or a bug."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import TypeVar

import torch

from kvtrim.errors import KvtrimError, UsageError
from kvtrim.records import OOM, REFUSED

Made = TypeVar("Made")


@dataclass(frozen=True)
class Failure:
    """Why there is no figure."""

    outcome: str
    reason: str


def attempt(what: Callable[[], Made]) -> Made | Failure:
    """What a function returns, or why it was refused or ran out of memory. Bugs pass through."""
    try:
        return what()
    except Exception as error:
        kind = outcome(error)
        if kind is None:
            raise
        failure = Failure(kind, reason(error, kind))
    gc.collect()  # only here, since the traceback held the tensors
    if failure.outcome == OOM and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return failure


def outcome(error: Exception) -> str | None:
    """Refused if kvtrim said no, oom if memory ran out, None if it is a bug."""
    full = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if full or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)):
        return OOM
    return REFUSED if isinstance(error, KvtrimError) else None


def reason(error: Exception, outcome: str) -> str:
    """Why, on one line."""
    text = " ".join(str(error).split())
    return text if outcome == REFUSED else f"{type(error).__name__}: {text[:300]}"


def finite(value: float) -> float:
    """A figure as it is.

    Raises:
        UsageError: it is none; half precision may overflow.
    """
    if not isfinite(value):
        raise UsageError("the model's numbers overflow in this format; use --dtype float32")
    return value
