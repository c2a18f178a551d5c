"""The Triton program behind `growing`: one new entry of one head."""

import triton
import triton.language as tl


@triton.jit
def append(
    flat_keys,
    flat_values,
    flat_positions,
    start,
    length,
    keys,
    values,
    positions,
    k_prompt,
    k_head,
    k_token,
    k_unit,
    v_prompt,
    v_head,
    v_token,
    v_unit,
    kv_heads,
    count,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One new entry of one head."""
    run, new = tl.program_id(0), tl.program_id(1)
    prompt, head = run // kv_heads, run % kv_heads
    slot = tl.load(start + run).to(tl.int64) + tl.load(length + run).to(tl.int64) - count + new
    d = tl.arange(0, BLOCK)
    key = keys + prompt * k_prompt + head * k_head + new * k_token + d * k_unit
    tl.store(flat_keys + slot * D + d, tl.load(key, mask=d < D), mask=d < D)
    value = values + prompt * v_prompt + head * v_head + new * v_token + d * v_unit
    tl.store(flat_values + slot * E + d, tl.load(value, mask=d < E), mask=d < E)
    tl.store(flat_positions + slot, tl.load(positions + prompt * count + new))
