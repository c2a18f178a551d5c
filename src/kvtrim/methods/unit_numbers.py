"""Which unit of a prompt's named part each position lies in; what a part is: `prompts.spans`."""

import torch

from kvtrim.types import Int, Spans, Tensor


def unit_numbers(spans: Spans, name: str, positions: Int[Tensor, "*any"]) -> Int[Tensor, "*any"]:
    """The number of the unit each position lies in, from 0 in the order given; -1 for none."""
    pieces = sorted((*piece, number) for number, unit in enumerate(spans[name]) for piece in unit)
    if not pieces:
        return torch.full_like(positions, -1, dtype=torch.int64)
    start, end, number = torch.tensor(pieces, device=positions.device).T.contiguous()
    piece = torch.bucketize(positions.long(), start, right=True) - 1
    inside = (piece >= 0) & (positions < end[piece])
    return number[piece].masked_fill(~inside, -1)
