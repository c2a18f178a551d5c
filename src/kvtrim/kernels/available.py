"""Whether Triton can be used here, said before it is; and what its launchers share."""

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec

import torch

from kvtrim.errors import UsageError

WIDEST = 256
"""Width of a head that the programs take at most."""

MOST_QUERIES = 16
"""New tokens that one launch of decode attention takes; more go in several."""

FORMATS = (torch.float32, torch.float16, torch.bfloat16)
"""Number formats that the programs know."""


def is_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter (TRITON_INTERPRET=1), on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


@cache
def obstacle(kind: str) -> str | None:
    """Why Triton's kernels do not run on devices of this type; None if they do."""
    if not has_triton():
        return "Triton is not installed (pip install 'kvtrim[triton]')"
    if kind != "cuda":
        return None if is_interpreted() else "no CUDA device"
    try:
        import triton

        triton.runtime.driver.active.get_current_target()  # builds what talks to the driver
    except Exception as error:  # no C compiler, no headers, no driver: Triton has no type for it
        return f"Triton does not work here ({type(error).__name__}: {str(error)[:200]})"
    return None


def on(device: torch.device) -> AbstractContextManager[object]:
    """Launch on the device of the tensors, not on the one that happens to be current."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def require_triton(device: torch.device) -> None:
    """Refuse what Triton cannot do here.

    Raises:
        UsageError: it is not installed, or the tensors are on a CPU and its interpreter is off.
    """
    if not has_triton():
        raise UsageError("impl='triton' needs Triton: pip install 'kvtrim[triton]', or use sdpa")
    if device.type != "cuda" and not is_interpreted():
        raise UsageError(
            f"impl='triton' needs a CUDA device, these tensors are on {device.type}; use "
            "impl='sdpa', or set TRITON_INTERPRET=1 before Python starts to try it (very slow)"
        )


def power_of_two(least: int) -> int:
    """The smallest power of two that is at least this: Triton's blocks have such sizes."""
    return 1 << max(0, least - 1).bit_length()
