"""Decode attention over a ragged store in Triton: every head's run in tiles, then merged.

A run of slots is cut into tiles of one size, so a head that holds a hundred times more than the
others becomes a hundred times more programs, not one long one. Each tile attends with all query
heads of its group at once and leaves its output and log-sum-exp; a second kernel merges them
(Dao et al., flash-decoding; https://pytorch.org/blog/flash-decoding). Lengths are read on the
device and tiles behind them do nothing, so one plan serves while the runs grow within `bound`.
"""

from dataclasses import dataclass
from typing import Any

import torch

from kvtrim.kernels.available import MOST_QUERIES, on, power_of_two, require_triton
from kvtrim.kernels.programs import split
from kvtrim.types import Counts, Float, Int, Tensor

programs: Any = split  # Triton's compiler knows their types, a type checker does not

_TILES = 512  # at least so many, if the runs are long enough: about four per multiprocessor
_LEAST, _MOST = 64, 1024  # slots of a tile


@dataclass(frozen=True)
class Tiles:
    """Which stretch of which head every program works on."""

    size: int  # slots of a tile, a power of two
    row: Int[Tensor, " tiles"]  # the head (b * K + h) of each
    first: Int[Tensor, " R1"]  # the first tile of each head, and the end
    bound: Counts  # the longest that the runs may become before new tiles are needed

    @classmethod
    def of(cls, bound: Counts, device: torch.device, size: int | None = None) -> "Tiles":
        """Tiles for runs of at most these lengths.

        Args:
            bound: longest length per prompt and KV head, on the CPU.
            size: slots of a tile; by default what gives every multiprocessor some.
        """
        longest = bound.flatten()
        if size is None:
            fair = power_of_two(max(1, int(longest.sum()) // _TILES))
            size = min(_MOST, max(_LEAST, fair))
        counts = (longest + size - 1) // size
        row = torch.repeat_interleave(torch.arange(len(counts)), counts)
        first = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(size, row.int().to(device), first.int().to(device), bound)


@dataclass(frozen=True)
class Attended:
    """What attention gave."""

    out: Float[Tensor, "B H Q E"]
    lse: Float[Tensor, "B H Q"]  # log of the sum of the exponentiated logits; -inf if none seen


def ragged(
    queries: Float[Tensor, "B H Q D"],
    keys: Float[Tensor, "T D"],
    values: Float[Tensor, "T E"],
    start: Int[Tensor, "B K"],
    length: Int[Tensor, "B K"],
    scale: float,
    softcap: float | None = None,
    tiles: Tiles | None = None,
    bias: Float[Tensor, " T"] | None = None,
) -> Attended:
    """Attend to flat slots, of which KV head (b, h) owns `length[b, h]` from `start[b, h]`.

    The last Q slots of a head belong to the Q queries, and query i sees nothing behind its own; a
    query that sees nothing gets zeros. Sums are fp32 whatever the number format.

    Args:
        start, length: on the CPU, or on the device if `tiles` are given.
        tiles: a plan made before, for runs that are at most as long as its bound.
        bias: added to the logits of each slot, fp32.

    Raises:
        UsageError: Triton is missing, or the tensors are on a CPU and its interpreter is off.
    """
    start, length, tiles = _place(queries.device, start, length, tiles)
    with on(queries.device):
        found = [
            _launch(part, keys, values, start, length - later, scale, softcap, tiles, bias)
            for part, later in _parts(queries)
        ]
    if len(found) == 1:
        return found[0]
    return Attended(
        torch.cat([part.out for part in found], dim=2),
        torch.cat([part.lse for part in found], dim=2),
    )


def _place(
    device: torch.device, start: Tensor, length: Tensor, tiles: Tiles | None
) -> tuple[Int[Tensor, "B K"], Int[Tensor, "B K"], Tiles]:
    """Starts and lengths on the device, and tiles for them."""
    require_triton(device)
    tiles = Tiles.of(length, device) if tiles is None else tiles
    return start.to(device), length.to(device), tiles


def _parts(queries: Float[Tensor, "B H Q D"]) -> list[tuple[Tensor, int]]:
    """The queries in parts that one launch takes, and how many come after each."""
    count = queries.shape[2]
    ends = range(min(count, MOST_QUERIES), count + MOST_QUERIES, MOST_QUERIES)
    return [
        (queries[:, :, max(0, end - MOST_QUERIES) : end], count - min(end, count)) for end in ends
    ]


def _launch(
    queries: Float[Tensor, "B H Q D"],
    keys: Float[Tensor, "T D"],
    values: Float[Tensor, "T E"],
    start: Int[Tensor, "B K"],
    length: Int[Tensor, "B K"],
    scale: float,
    softcap: float | None,
    tiles: Tiles,
    bias: Float[Tensor, " T"] | None,
) -> Attended:
    rows, heads, count, width = queries.shape
    kv_heads, wide, device = start.shape[1], values.shape[-1], queries.device
    together, block = heads // kv_heads * count, max(16, power_of_two(max(width, wide)))
    narrow = block > 128 or queries.dtype == torch.float32  # what smaller GPUs have memory for
    at_once = min(32 if narrow else 64, max(16, power_of_two(together)))
    parts = torch.empty(len(tiles.row), together, wide, dtype=torch.float32, device=device)
    sums = torch.empty(len(tiles.row), together, dtype=torch.float32, device=device)
    programs.tile[(len(tiles.row), -(-together // at_once))](
        queries,
        keys,
        values,
        start,
        length,
        tiles.row,
        tiles.first,
        sums if bias is None else bias,
        parts,
        sums,
        scale,
        0.0 if softcap is None else softcap,
        *queries.stride()[:3],
        keys.stride(0),
        values.stride(0),
        kv_heads,
        COUNT=count,
        GROUP=heads // kv_heads,
        D=width,
        E=wide,
        BLOCK_D=block,
        ROWS=at_once,
        SIZE=tiles.size,
        BLOCK_N=_slots_at_once(tiles.size, block, queries),
        CAPPED=softcap is not None,
        BIASED=bias is not None,
        PRECISION=_precision(queries),
    )
    out = torch.empty(rows, heads, count, wide, dtype=queries.dtype, device=device)
    lse = torch.empty(rows, heads, count, dtype=torch.float32, device=device)
    grid = (rows * kv_heads, together)
    programs.merge[grid](parts, sums, tiles.first, out, lse, E=wide, BLOCK_E=block, BLOCK_T=16)
    return Attended(out, lse)


def _slots_at_once(size: int, block: int, queries: Tensor) -> int:
    """Slots whose keys and values fit into shared memory together."""
    exact = queries.dtype == torch.float32
    return min(size, 64 // ((2 if block > 128 else 1) * (2 if exact else 1)))


def _precision(queries: Tensor) -> str:
    """Products of fp32 numbers are exact; those of halves are in any case."""
    return "ieee" if queries.dtype == torch.float32 else "tf32"
