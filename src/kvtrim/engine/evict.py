"""From one layer's view to the slots that survive: policy, budget, selection, in that order."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kvtrim.methods import Method
from kvtrim.selection import select
from kvtrim.types import Counts, Float, Kept, LayerView, Room, Scores, Tensor


@dataclass
class Evictor:
    """Applies one method to prompts of one length, layer after layer."""

    method: Method
    keep: int  # entries per head, protected slots included
    asked: float  # the same before rounding
    _leader: tuple[int, Kept | None] = field(default=(-1, None))

    def choose(self, view: LayerView) -> Kept | None:
        """The surviving slots of a layer, or None if all of them stay."""
        method = self.method
        if method.budget.unlimited or view.index in method.skip_layers or view.tokens <= self.keep:
            return None
        leader = view.index - view.index % method.reuse
        if self._leader[0] != leader:
            self._leader = (leader, self._select(view))
        return self._leader[1]

    def _select(self, view: LayerView) -> Kept | None:
        policy, slots = self.method.policy, view.keys.shape[2]
        sinks, recent = policy.sinks, policy.recent(self.keep)
        room = Room(
            layer=view.index,
            layers=view.layers,
            heads=view.keys.shape[1],
            keep=self.keep,
            asked=self.asked,
            protected=sinks + recent,
            tokens=view.tokens,
        )
        scores = policy.score(view)
        counts = self.method.budget.counts(room, _candidates(view, scores, sinks, recent))
        held = torch.full_like(counts, slots) if view.lengths is None else view.lengths
        kept = select(
            scores,
            counts,
            slots if view.lengths is None else held,
            sinks=sinks,
            recent=recent,
            unit=self.method.unit,
            members=self.method.unit.members(view.spans, view.positions),
        )
        return None if torch.equal(kept.counts, held) else kept


def merge(parts: Sequence[tuple[slice, Kept | None]], held: Counts) -> Kept | None:
    """What a batch keeps, from what its groups of prompts keep; None if every slot stays."""
    if all(kept is None for _, kept in parts):
        return None
    if len(parts) == 1:
        return parts[0][1]
    counts = held.clone()
    for rows, kept in parts:
        if kept is not None:
            counts[rows] = kept.counts
    device = next(kept.slots.device for _, kept in parts if kept is not None)
    everything = torch.arange(int(counts.max())).expand(*counts.shape, -1)
    slots = everything.masked_fill(everything >= counts[..., None], -1).to(device)
    for rows, kept in parts:
        if kept is not None:
            slots[rows] = -1
            slots[rows, :, : kept.slots.shape[-1]] = kept.slots
    return Kept(slots, counts)


def _candidates(
    view: LayerView, scores: Scores, sinks: int, recent: int
) -> Float[Tensor, "B K C"]:
    """The scores of the slots that compete; -inf where a head has fewer of them."""
    last = max(sinks, view.keys.shape[2] - recent)
    competing = scores[..., sinks:last]
    if view.lengths is None:
        return competing
    behind = torch.arange(sinks, last) >= (view.lengths - recent)[..., None]
    return competing.masked_fill(behind.to(scores.device), -torch.inf)
