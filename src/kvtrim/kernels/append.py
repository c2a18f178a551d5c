"""Adding new entries to a ragged store in Triton: behind each run, wherever that ends by now.

Lengths are read on the device, so a captured step can be replayed while the runs grow.
"""

from collections.abc import Mapping
from typing import Any

from kvtrim.kernels.available import on, power_of_two, require_triton
from kvtrim.kernels.programs import append as growing
from kvtrim.types import Float, Int, Tensor

programs: Any = growing  # Triton's compiler knows their types, a type checker does not


def append(
    buffers: Mapping[str, Tensor],
    start: Int[Tensor, "B K"],
    length: Int[Tensor, "B K"],
    keys: Float[Tensor, "B K Q D"],
    values: Float[Tensor, "B K Q E"],
    positions: Int[Tensor, "B Q"],
) -> None:
    """Write Q entries per head at the end of its run, which must have room for them.

    Args:
        buffers: "keys" [T, D], "values" [T, E] and "positions" [T], changed in place.
        start, length: of each run on the device, the new entries counted.

    Raises:
        UsageError: Triton is missing, or the tensors are on a CPU and its interpreter is off.
    """
    require_triton(keys.device)
    rows, kv_heads, count, width = keys.shape
    wide = values.shape[-1]
    block = power_of_two(max(width, wide))
    with on(keys.device):
        programs.append[(rows * kv_heads, count)](
            buffers["keys"],
            buffers["values"],
            buffers["positions"],
            start,
            length,
            keys,
            values,
            positions.contiguous(),
            *keys.stride(),
            *values.stride(),
            kv_heads,
            count,
            D=width,
            E=wide,
            BLOCK=block,
        )
