"""The Triton programs behind `split`: tiles of runs, and their merger."""

import triton
import triton.language as tl

from kvtrim.kernels.programs.tiles import keys_at, logits, stretch


@triton.jit
def tile(
    queries,
    keys,
    values,
    start,
    length,
    tile_row,
    tile_first,
    bias,
    parts,
    sums,
    scale,
    cap,
    q_prompt,
    q_head,
    q_token,
    k_slot,
    v_slot,
    kv_heads,
    COUNT: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr,
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile: the group's queries (head-major) over its slots, normalised, and log-sum-exp."""
    row, held, first, begin, end = stretch(tile_row, tile_first, start, length, SIZE)
    prompt = (row // kv_heads).to(tl.int64)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    used = m < GROUP * COUNT
    at = prompt * q_prompt + (row % kv_heads * GROUP + m // COUNT) * q_head
    at += (m % COUNT) * q_token
    q = tl.load(queries + at[:, None] + d[None, :], mask=used[:, None] & (d < D)[None, :], other=0)
    seen = held - COUNT + 1 + m % COUNT
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for low in range(begin, end, BLOCK_N):
        slots = low + tl.arange(0, BLOCK_N)
        key = keys_at(keys + first * k_slot, slots, end, k_slot, D, BLOCK_D)
        seeing = logits(q, key, slots, seen, end, scale, cap, CAPPED, PRECISION)
        if BIASED:
            more = tl.load(bias + first + slots, mask=slots < end, other=0.0)
            seeing += more[None, :] * 1.4426950408889634
        higher = tl.maximum(top, tl.max(seeing, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(seeing - base[:, None])
        decay = tl.exp2(top - base)
        inside = (slots < end)[:, None] & (d < E)[None, :]
        value = tl.load(
            values + (first + slots)[:, None] * v_slot + d[None, :], mask=inside, other=0.0
        )
        mixed = mixed * decay[:, None]
        mixed += tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
        total = total * decay + tl.sum(weights, 1)
        top = higher
    some = tl.where(total == 0.0, 1.0, total)
    place = tl.program_id(0).to(tl.int64) * GROUP * COUNT + m
    out = parts + place[:, None] * E + d[None, :]
    tl.store(out, mixed / some[:, None], mask=used[:, None] & (d < E)[None, :])
    found = tl.where(total == 0.0, float("-inf"), top + tl.log2(some))
    tl.store(sums + place, found, mask=used)


@triton.jit
def merge(
    parts,
    sums,
    tile_first,
    out,
    lse,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Join the tiles of one head for one of its group's queries."""
    row, m, together = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    last = tl.load(tile_first + row + 1)
    e = tl.arange(0, BLOCK_E)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    mixed = tl.zeros([BLOCK_E], tl.float32)
    for low in range(tl.load(tile_first + row), last, BLOCK_T):
        tiles = low + tl.arange(0, BLOCK_T)
        place = tiles.to(tl.int64) * together + m
        share = tl.load(sums + place, mask=tiles < last, other=float("-inf"))
        higher = tl.maximum(top, tl.max(share, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(share - base)
        decay = tl.exp2(top - base)
        inside = (tiles < last)[:, None] & (e < E)[None, :]
        part = tl.load(parts + place[:, None] * E + e[None, :], mask=inside, other=0.0)
        mixed = mixed * decay + tl.sum(part * weights[:, None], 0)
        total = total * decay + tl.sum(weights, 0)
        top = higher
    some = tl.where(total == 0.0, 1.0, total)
    place = row.to(tl.int64) * together + m
    tl.store(out + place * E + e, (mixed / some).to(out.dtype.element_ty), mask=e < E)
    found = tl.where(total == 0.0, float("-inf"), (top + tl.log2(some)) * 0.6931471805599453)
    tl.store(lse + place + tl.arange(0, 1), found)
