"""How much each row of a head's keys or values weighs in them, and its share among neighbours."""

from typing import Literal

import torch

from kvtrim.types import Float, Int, Tensor

Padding = Literal["front", "tail"]

_LEAST = 1e-12  # a run of zeros has shares of zero, not of nothing


def gaussian(seed: int, heads: int, width: int, project: int) -> Float[Tensor, "K X R"]:
    """A random projection per head that keeps squared norms on average: entries N(0, 1 / R).

    Drawn on the CPU, so that a seed gives the same numbers on every device.
    """
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(heads, width, project, generator=draw) / project**0.5


def energies(
    rows: Float[Tensor, "B K S D"], sketch: Float[Tensor, "*heads X R"] | None = None
) -> Float[Tensor, "B K S"]:
    """Squared norm of each row, or of its projection: `sketch` [X, R] or [K, X, R] with X >= D."""
    rows = rows.float()
    if sketch is not None:
        rows = rows @ sketch[..., : rows.shape[-1], :].to(rows.device)
    return rows.square().sum(dim=-1)


def leverages(rows: Float[Tensor, "B K S D"], rank: int | None = None) -> Float[Tensor, "B K S"]:
    """Squared norm of each row of the left singular vectors, all of them or the first `rank`.

    A head's leverages sum to its rank. Directions that only rounding gives do not count.
    """
    left, strengths, _ = torch.linalg.svd(rows.float(), full_matrices=False)
    least = torch.finfo(torch.float32).eps * max(rows.shape[-2:])
    real = strengths > least * strengths[..., :1]
    if rank is not None:
        real[..., rank:] = False
    return (left.square() * real[..., None, :]).sum(dim=-1)


def shares(weights: Float[Tensor, "B K S"]) -> Float[Tensor, "B K S"]:
    """Each weight over its head's sum."""
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def local_shares(
    weights: Float[Tensor, "B K S"], lengths: Int[Tensor, "B K"], width: int, padding: Padding
) -> Float[Tensor, "B K S"]:
    """Each weight over the sum of its run of `width` slots; the run at the `padding` is shorter.

    Slots behind a head's length must weigh nothing.
    """
    slots = weights.shape[-1]
    shift = (-lengths % width if padding == "front" else torch.zeros_like(lengths))[..., None]
    places = torch.arange(slots + -slots % width + width, device=weights.device)
    source = places - shift  # the slot at each place of the padded row
    outside = (source < 0) | (source >= slots)
    padded = weights.gather(-1, source.clamp(0, slots - 1)).masked_fill(outside, 0)
    runs = padded.unflatten(-1, (-1, width))
    local = runs / runs.sum(dim=-1, keepdim=True).clamp(min=_LEAST)
    return local.flatten(-2).gather(-1, places[:slots] + shift)
