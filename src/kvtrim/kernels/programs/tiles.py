"""What several programs have in common: logits, and which stretch of which run a tile is.

Logits are to base 2, since that is the exponential which hardware has.
"""

import triton
import triton.language as tl


@triton.jit
def logits(
    q,
    key,
    slots,
    seen,
    end,
    scale,
    cap,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits to base 2 of queries [M, D] over keys [D, N]; -inf where nothing is seen."""
    found = tl.dot(q, key, input_precision=PRECISION) * scale
    if CAPPED:
        found = cap * (2.0 * tl.sigmoid(2.0 * found / cap) - 1.0)
    visible = (slots[None, :] < seen[:, None]) & (slots < end)[None, :]
    return tl.where(visible, found * 1.4426950408889634, float("-inf"))


@triton.jit
def keys_at(keys, slots, end, k_slot, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Keys [D, N] of some slots; zeros behind the last one and beyond the head's width."""
    d = tl.arange(0, BLOCK_D)
    inside = (slots < end)[None, :] & (d < D)[:, None]
    place = slots[None, :].to(tl.int64) * k_slot + d[:, None]
    return tl.load(keys + place, mask=inside, other=0.0)


@triton.jit
def stretch(tile_row, tile_first, start, length, SIZE: tl.constexpr):
    """The tile at hand: its row, entries the row holds, first slot, and from where to where."""
    tile = tl.program_id(0)
    row = tl.load(tile_row + tile)
    begin = (tile - tl.load(tile_first + row)) * SIZE
    held = tl.load(length + row).to(tl.int32)
    return row, held, tl.load(start + row).to(tl.int64), begin, tl.minimum(begin + SIZE, held)
