"""Attention that slots received from all queries, its sum or its largest: n x n never exists.

Two passes over blocks in Triton: each query's normaliser first, then what each slot received.
Memory is one number per query and head and one per slot and head.
"""

from typing import Any

import torch

from kvtrim.kernels.available import on, power_of_two, require_triton
from kvtrim.kernels.programs import columns
from kvtrim.types import Counts, Float, Tensor

programs: Any = columns  # Triton's compiler knows their types, a type checker does not


def largest(
    queries: Float[Tensor, "B H Q D"],
    keys: Float[Tensor, "B K S D"],
    scale: float,
    softcap: float | None = None,
    length: Counts | None = None,
    weights: Float[Tensor, "B Q"] | None = None,
) -> Float[Tensor, "B H S"]:
    """Largest attention of any of the queries to each slot; arguments and errors as of `sums`."""
    return sums(queries, keys, scale, softcap, length, weights, add=False)


def sums(
    queries: Float[Tensor, "B H Q D"],
    keys: Float[Tensor, "B K S D"],
    scale: float,
    softcap: float | None = None,
    length: Counts | None = None,
    weights: Float[Tensor, "B Q"] | None = None,
    own: bool = True,
    add: bool = True,
) -> Float[Tensor, "B H S"]:
    """Softmax attention of the newest Q queries of each head to each slot, added up, fp32.

    Args:
        length: slots of each KV head, where they differ; what is behind them gets 0.
        weights: what each query counts for; 1 by default.
        own: what a query pays to its own slot counts too.
        add: add up; else take the largest, each query's times its weight.

    Raises:
        UsageError: Triton is missing, or the tensors are on a CPU and its interpreter is off.
    """
    require_triton(queries.device)
    (rows, heads, count, width), slots, device = queries.shape, keys.shape[2], queries.device
    if length is None:
        length = torch.full(keys.shape[:2], slots)
    counted = torch.ones(rows, count, device=device) if weights is None else weights.float()
    if queries.stride(3) != 1 or keys.stride(3) != 1:
        queries, keys = queries.contiguous(), keys.contiguous()
    lse = torch.empty(rows * heads, count, dtype=torch.float32, device=device)
    out = torch.empty(rows, heads, slots, dtype=torch.float32, device=device)
    block, exact = max(16, power_of_two(width)), queries.dtype == torch.float32
    at_once = 32 if block > 128 or exact else 64
    given = (*queries.stride()[:3], *keys.stride()[:3], heads, count)
    fixed = {
        "GROUP": heads // keys.shape[1],
        "D": width,
        "BLOCK_D": block,
        "BLOCK_M": min(at_once, max(16, power_of_two(count))),
        "BLOCK_N": at_once,
        "CAPPED": softcap is not None,
        "PRECISION": "ieee" if exact else "tf32",
    }
    held, cap = length.to(device).contiguous(), 0.0 if softcap is None else softcap
    grid = (-(-count // fixed["BLOCK_M"]), rows * heads)
    with on(device):
        programs.normalisers[grid](queries, keys, held, lse, scale, cap, *given, **fixed)
        grid = (-(-slots // fixed["BLOCK_N"]), rows * heads)
        seen = queries, keys, held, lse, counted.contiguous(), out, scale, cap
        programs.columns[grid](*seen, *given, slots, OWN=own, ADD=add, **fixed)
    return out
