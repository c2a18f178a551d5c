"""From one layer's view to the slots that survive: policy, budget, selection, in that order."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kvtrim.methods.budgets.base import Ledger
from kvtrim.methods.demotion import demote
from kvtrim.methods.method import Method
from kvtrim.methods.policies.base import checked_rescore, checked_score
from kvtrim.methods.selection import SecondStage, select
from kvtrim.types import Counts, Float, Kept, LayerView, Room, Scores, Tensor

LATE = 2
"""While layers go by, they are cut again once all together hold half more than they may."""


class Cutter(ABC):
    """Cuts prompts of one length, layer after layer."""

    keep: int
    scored: Scores | None = None
    """Scores of all slots of the layer just cut, where layers compete for one budget."""
    dealt: Sequence[Counts] = ()
    """Then the entries per head of every layer so far."""

    @abstractmethod
    def choose(self, view: LayerView, share: Counts | None = None) -> Kept | None:
        """The surviving slots of a layer, or None if all of them stay.

        `share`: entries per head that an earlier cut settled for this layer.
        """

    def late(self, held: Sequence[Counts]) -> bool:
        """Whether layers hold so much more than they may that they are to be cut again.

        `held`: entries per head of every layer so far.
        """
        return False

    def again(self, layer: int, scores: Float[Tensor, "B K S"], held: Counts) -> Kept | None:
        """What survives of an earlier layer now that more layers share the budget."""
        return None


Cutters = Sequence[tuple[slice, Cutter]]
"""Groups of prompts, and what cuts each of them."""


@dataclass
class Evictor(Cutter):
    """Applies one method to a prompt, or to all that is held."""

    method: Method
    keep: int  # entries per head, protected slots included
    asked: float  # the same before rounding
    tokens: int  # of the prompt so far; a layer may have read a part of it
    decoding: bool = False  # the prompt is over
    scored: Scores | None = None
    dealt: Sequence[Counts] = ()
    _ledger: Ledger | None = None
    _leader: tuple[int, Kept | None] = (-1, None)

    @property
    def cuts(self) -> bool:
        """Something may have to go."""
        return self.tokens > self.keep or self.method.budget.selective

    def choose(self, view: LayerView, share: Counts | None = None) -> Kept | None:
        """See `Cutter.choose`."""
        method = self.method
        self.scored = None
        read = self.tokens if method.budget.model_wide else view.tokens  # all layers compete
        fits = read <= self.keep and not method.budget.selective
        if method.budget.unlimited or view.index in method.skip_layers or fits:
            return None
        leader = view.index - view.index % method.reuse
        if self._leader[0] != leader:
            self._leader = (leader, self._select(view, share))
        return self._leader[1]

    def late(self, held: Sequence[Counts]) -> bool:
        """See `Cutter.late`."""
        protected = sum(self._protected_ends())
        may = sum(int(counts.sum()) + counts.numel() * protected for counts in self.dealt)
        return bool(self.dealt) and sum(int(counts.sum()) for counts in held) > may + may // LATE

    def again(self, layer: int, scores: Float[Tensor, "B K S"], held: Counts) -> Kept | None:
        """See `Cutter.again`."""
        if not self.dealt:
            return None
        sinks, recent = self._protected_ends()
        counts = self.dealt[layer]
        if bool((held <= counts + sinks + recent).all()):
            return None
        candidates = max(sinks, scores.shape[-1] - recent)
        return select(scores[..., :candidates], counts, held, sinks=sinks, recent=recent)

    def _protected_ends(self) -> tuple[int, int]:
        policy = self.method.policy
        newest = min(policy.local, (self.keep - policy.sinks) // 2) if self.decoding else 0
        return policy.sinks, max(policy.recent(self.keep), newest)

    def _select(self, view: LayerView, share: Counts | None) -> Kept | None:
        policy, slots = self.method.policy, view.keys.shape[2]
        sinks, recent = self._protected_ends()
        plain = checked_score(policy, view)
        scores = self._demote(plain, view)
        counts = self._counts(view, scores) if share is None else share
        held = torch.full_like(counts, slots) if view.lengths is None else view.lengths
        kept = select(
            scores,
            counts,
            slots if view.lengths is None else held,
            sinks=sinks,
            recent=recent,
            unit=self.method.unit,
            second=self._second(view, plain, counts),
            members=self.method.unit.members(view.spans, view.positions),
        )
        return None if torch.equal(kept.counts, held) else kept

    def _counts(self, view: LayerView, scores: Scores) -> Counts:
        """How many candidates each head keeps."""
        budget, policy = self.method.budget, self.method.policy
        sinks, recent = self._protected_ends()
        room = Room(
            layer=view.index,
            layers=view.layers,
            heads=view.keys.shape[1],
            keep=self.keep,
            asked=self.asked,
            protected=sinks + recent,
            tokens=view.tokens,
            group=view.queries.shape[1] // view.keys.shape[1],
        )
        competing = _candidates(view, scores, sinks, recent)
        if not budget.model_wide:
            return budget.counts(room, competing)
        self._ledger = self._ledger or budget.open()
        self.dealt = self._ledger.add(room, competing, policy.preference(view, competing))
        self.scored = F.pad(scores, (0, view.keys.shape[2] - scores.shape[-1]))
        return self.dealt[-1]

    def _second(self, view: LayerView, scores: Scores, counts: Counts) -> SecondStage | None:
        policy = self.method.policy
        if policy.first_stage == 1:
            return None
        first = policy.first_entries(counts, self.keep)
        return SecondStage(first, self._demote(checked_rescore(policy, view, scores), view))

    def _demote(self, scores: Scores, view: LayerView) -> Scores:
        return demote(scores, view) if self.method.demote else scores


def merge(parts: Sequence[tuple[slice, Kept | None]], held: Counts) -> Kept | None:
    """What a batch keeps, from what its groups of prompts keep; None if every slot stays.

    All slots of prompts in no group stay.
    """
    if all(kept is None for _, kept in parts):
        return None
    rows, kept = parts[0]
    if rows.stop - rows.start == held.shape[0]:
        return kept
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
