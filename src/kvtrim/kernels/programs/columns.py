"""The Triton programs behind `columns`: normalisers of queries, then sums over them by slot."""

import triton
import triton.language as tl

from kvtrim.kernels.programs.tiles import keys_at, logits


@triton.jit
def normalisers(
    queries,
    keys,
    length,
    lse,
    scale,
    cap,
    q_prompt,
    q_head,
    q_token,
    k_prompt,
    k_head,
    k_slot,
    heads,
    count,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Base-2 log-sum-exp of some queries of one head over every slot that each sees."""
    prompt, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    kv_head = head // GROUP
    held = tl.load(length + prompt * (heads // GROUP) + kv_head).to(tl.int32)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    at = prompt.to(tl.int64) * q_prompt + head.to(tl.int64) * q_head
    own = (m < count)[:, None] & (d < D)[None, :]
    q = tl.load(queries + at + m[:, None].to(tl.int64) * q_token + d[None, :], mask=own, other=0)
    seen = tl.where(m < count, held - count + 1 + m, 0)
    at = prompt.to(tl.int64) * k_prompt + kv_head.to(tl.int64) * k_head
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for low in range(0, tl.max(seen, 0), BLOCK_N):
        slots = low + tl.arange(0, BLOCK_N)
        key = keys_at(keys + at, slots, held, k_slot, D, BLOCK_D)
        seeing = logits(q, key, slots, seen, held, scale, cap, CAPPED, PRECISION)
        higher = tl.maximum(top, tl.max(seeing, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(seeing - base[:, None]), 1)
        top = higher
    some = tl.where(total == 0.0, 1.0, total)
    found = tl.where(total == 0.0, float("inf"), top + tl.log2(some))  # exp2(x - inf) is 0
    tl.store(lse + tl.program_id(1).to(tl.int64) * count + m, found, mask=m < count)


@triton.jit
def columns(
    queries,
    keys,
    length,
    lse,
    weights,
    out,
    scale,
    cap,
    q_prompt,
    q_head,
    q_token,
    k_prompt,
    k_head,
    k_slot,
    heads,
    count,
    width,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr,
    OWN: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What some slots received from the queries of one head, added up or at most.

    Each query counts by its weight.
    """
    prompt, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    kv_head = head // GROUP
    held = tl.load(length + prompt * (heads // GROUP) + kv_head).to(tl.int32)
    low = tl.program_id(0) * BLOCK_N
    slots = low + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    at = prompt.to(tl.int64) * k_prompt + kv_head.to(tl.int64) * k_head
    key = keys_at(keys + at, slots, held, k_slot, D, BLOCK_D)
    at = prompt.to(tl.int64) * q_prompt + head.to(tl.int64) * q_head
    received = tl.zeros([BLOCK_N], tl.float32)
    # the first query that sees any of these slots stands at the first of them
    begin = tl.maximum(low - held + count, 0) // BLOCK_M * BLOCK_M
    for first in range(begin, count, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        own = (m < count)[:, None] & (d < D)[None, :]
        wanted = at + m[:, None].to(tl.int64) * q_token + d[None, :]
        q = tl.load(queries + wanted, mask=own, other=0)
        norm = tl.load(
            lse + tl.program_id(1).to(tl.int64) * count + m, mask=m < count, other=float("inf")
        )
        counted = tl.load(weights + prompt.to(tl.int64) * count + m, mask=m < count, other=0.0)
        seen = held - count + m + (1 if OWN else 0)
        seeing = logits(q, key, slots, seen, held, scale, cap, CAPPED, PRECISION)
        given = tl.exp2(seeing - norm[:, None]) * counted[:, None]
        if ADD:
            received += tl.sum(given, 0)
        else:
            received = tl.maximum(received, tl.max(given, 0))
    tl.store(out + tl.program_id(1).to(tl.int64) * width + slots, received, mask=slots < width)
