"""From scores and counts to the slots that survive.

Sinks (first slots) and the recent window (last slots) are kept outside the ranking, not by raising
their scores; only where a unit lets the window compete (kvpress) is it raised above all others.
Equal scores: the lower slot wins (`unit.py`). Survivors are in ascending order.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kvtrim.methods.unit import Token, Unit
from kvtrim.types import Bool, Counts, Float, Int, Kept, Scores, Tensor


@dataclass(frozen=True)
class SecondStage:
    """The last entries of each head are chosen by other scores than the first."""

    first: Counts  # how many candidates the first scores choose
    scores: Scores  # of the same slots as the first


def select(
    scores: Scores,
    counts: Counts,
    slots: int | Counts,
    *,
    sinks: int = 0,
    recent: int = 0,
    unit: Unit | None = None,
    second: SecondStage | None = None,
    members: Int[Tensor, "B K S"] | None = None,
    protected: Bool[Tensor, "B K S"] | None = None,
) -> Kept:
    """Choose the survivors among `slots` slots per head.

    Args:
        scores: [B, K, N] of the first N slots; N reaches at least to the recent window.
        counts: [B, K] candidates to keep beside sinks and window.
        slots: slots per head, one number or [B, K] where heads differ.
        sinks, recent: first and last slots that always stay.
        unit: what is kept as a whole; tokens by default.
        second: other scores for the last entries; only the first scores choose by default.
        members: the unit each slot belongs to, as `Unit.members` numbers them.
        protected: more slots that always stay.
    """
    unit = unit or Token()
    lengths = slots if isinstance(slots, torch.Tensor) else torch.full(counts.shape, slots)
    if unit.window_competes:
        scores, counts = _raise_window(scores, lengths, recent), counts + recent
        if second is not None:
            raised = _raise_window(second.scores, lengths, recent)
            second = SecondStage(second.first + recent, raised)
        recent = 0
    width = int(lengths.max())
    ends = (lengths - recent).clamp(min=0)  # per head, candidates are the slots first <= j < end
    first = min(sinks, width)
    last = max(first, int(ends.max()))
    competing = scores[..., first:last]
    behind = None
    if isinstance(slots, torch.Tensor):
        behind = torch.arange(first, last) >= ends[..., None]
        competing = competing.masked_fill(behind.to(scores.device), -torch.inf)
    if protected is not None:
        competing = competing.masked_fill(protected[..., first:last], -torch.inf)
    counts = counts.minimum((ends - first).clamp(min=0))
    stay = torch.ones(*counts.shape, width, dtype=torch.bool, device=scores.device)
    of = None if members is None else members[..., first:last]
    part = slice(first, last)
    stay[..., first:last] = _choose(unit, competing, counts, second, part, of)
    if protected is not None:
        stay |= protected
    if behind is not None:
        stay[..., first:last] |= behind.to(scores.device)
        stay &= (torch.arange(width) < lengths[..., None]).to(scores.device)
    return kept_from_mask(stay)


def _choose(
    unit: Unit,
    scores: Scores,
    counts: Counts,
    second: SecondStage | None,
    competing: slice,
    members: Int[Tensor, "B K N"] | None,
) -> Bool[Tensor, "B K N"]:
    if second is None:
        return unit.choose(scores, counts, members)
    stay = unit.choose(scores, counts.minimum(second.first), members)
    others = second.scores[..., competing].masked_fill(stay | scores.isneginf(), -torch.inf)
    return stay | unit.choose(others, counts - stay.sum(dim=-1).cpu(), members)


def _raise_window(scores: Scores, lengths: Counts, recent: int) -> Float[Tensor, "B K S"]:
    """Give each head's recent window a score above every other (kvpress)."""
    slot, width = torch.arange(int(lengths.max())), scores.shape[-1]
    window = (slot >= lengths[..., None] - recent).to(scores.device)
    top = scores.amax(dim=(1, 2), keepdim=True) + 1 if width else scores.new_ones(1)
    padded = F.pad(scores, (0, max(0, len(slot) - width)))[..., : len(slot)]
    return torch.where(window, top, padded)


def kept_from_mask(stay: Bool[Tensor, "B K S"]) -> Kept:
    """The survivors of a mask, ascending per head, padded with -1 at the end."""
    counts = stay.sum(dim=-1)
    slots = torch.full((*counts.shape, int(counts.max())), -1, device=stay.device)
    row, head, slot = stay.nonzero(as_tuple=True)
    slots[row, head, stay.cumsum(dim=-1)[row, head, slot] - 1] = slot
    return Kept(slots, counts.cpu())
