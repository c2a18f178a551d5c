"""A pass of which deeper layers read a part: the tokens that a propagation lets go on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvtrim.engine.tokens import Pass
from kvtrim.types import Int, Tensor

Chosen = Sequence[tuple[slice, Tensor | None]]
"""For each group of prompts the tokens [B, T] that go on, by their numbers in the layer; None is
all of them. Groups differ in T."""


@dataclass(frozen=True)
class Narrowing:
    """Which columns of a pass the layers above one layer read."""

    layer: int  # the one at which they were chosen
    now: Pass  # the pass as the layers above see it
    step: Int[Tensor, "B w"]  # their columns among those that this layer read
    columns: Int[Tensor, "B w"]  # and among all columns of the pass
    slots: list[Tensor]  # of each prompt's tokens among those that this layer read


def narrow_pass(
    layer: int, now: Pass, chosen: Chosen, before: Narrowing | None = None
) -> Narrowing | None:
    """What goes on; None if everything does.

    Prompts of a batch may send on different numbers of tokens. Then columns that were not chosen
    fill up the shorter ones, in front, and count as padding above.
    """
    if all(slots is None for _, slots in chosen):
        return None
    picked, positions, numbers = [], [], []
    for rows, slots in chosen:
        for number, row in enumerate(range(rows.start, rows.stop)):
            real = torch.arange(now.columns) if now.real is None else now.real[row]
            own = torch.arange(len(real)) if slots is None else slots[number].cpu()
            picked.append(real[own])
            numbers.append(own)
            positions.append(now.row_positions(row, torch.device("cpu"))[0, 0][own])
    width = max(map(len, picked))
    filled = [_fill_up(columns, width, now.columns) for columns in picked]
    step = torch.stack([columns for columns, _ in filled])
    full = all(len(columns) == width for columns in picked)
    real = None if full else [own.nonzero()[:, 0] for _, own in filled]
    above = Pass(width, now.first, real, positions)
    columns = step if before is None else before.columns.gather(1, step)
    return Narrowing(layer, above, step, columns, numbers)


def _fill_up(picked: Int[Tensor, " T"], width: int, columns: int) -> tuple[Tensor, Tensor]:
    """So many columns, those that were picked last, and which of them were picked.

    The last column has to be the last token's, of which `generate` takes the logits.
    """
    spare = torch.ones(columns, dtype=torch.bool)
    spare[picked] = False
    filling = spare.nonzero()[: width - len(picked), 0]
    return torch.cat([filling, picked]), torch.arange(width) >= len(filling)
