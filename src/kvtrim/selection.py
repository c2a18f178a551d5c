"""From scores and counts to the slots that survive. The only owner of sinks, window, ties and
units.

Sinks (first slots) and the recent window (last slots) are kept outside the ranking, never by
raising their scores. Equal scores: the lower slot wins. Survivors are in ascending order.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from kvtrim.errors import UsageError
from kvtrim.spans import unit_numbers
from kvtrim.types import Bool, Counts, Float, Int, Kept, Scores, Spans, Tensor


class Unit(ABC):
    """What is kept or dropped as a whole. Subclasses are frozen dataclasses."""

    window_competes: bool = False
    """The recent window is not set apart but enters the ranking above all other scores
    (kvpress).
    """

    def members(
        self, spans: Sequence[Spans], positions: Int[Tensor, "B K S"]
    ) -> Int[Tensor, "B K S"] | None:
        """The number of the unit each slot belongs to, for units that the prompt names; -1 is
        fixed.
        """
        return None

    @abstractmethod
    def choose(
        self, scores: Scores, counts: Counts, members: Int[Tensor, "B K N"] | None = None
    ) -> Bool[Tensor, "B K N"]:
        """Which candidates stay, at most `counts` [B, K] per head; -inf is no candidate."""


@dataclass(frozen=True)
class Token(Unit):
    """Every slot by itself."""

    def choose(
        self, scores: Scores, counts: Counts, members: Int[Tensor, "B K N"] | None = None
    ) -> Bool[Tensor, "B K N"]:
        """See `Unit.choose`."""
        return _rank(scores) < counts.to(scores.device)[..., None]


@dataclass(frozen=True)
class Chunk(Unit):
    """Runs of `chunk` consecutive candidates, ranked by the sum of their scores.

    The last run may be shorter. A head whose budget is smaller than one run falls back to tokens.

    Source: ChunkKV, https://arxiv.org/abs/2502.00299, Algorithm 1; `window_competes`, `shared` and
    reduce="mean" together are NVIDIA/kvpress@8bb29b9, presses/chunkkv_press.py.
    """

    chunk: int = 10
    reduce: Literal["sum", "mean"] = "sum"
    fill: Literal["none", "partial"] = "none"  # entries no whole run fits into: unused, or the
    # leading tokens of the next best run
    shared: bool = False  # one set for all heads of the layer, by the sum of their scores
    window_competes: bool = False

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise UsageError(f"a chunk has at least one token, got chunk={self.chunk}")

    def choose(
        self, scores: Scores, counts: Counts, members: Int[Tensor, "B K N"] | None = None
    ) -> Bool[Tensor, "B K N"]:
        """See `Unit.choose`."""
        width = scores.shape[-1]
        if self.shared:
            scores = scores.sum(dim=1, keepdim=True).expand_as(scores)
        entries = counts.to(scores.device)[..., None]  # [B, K, 1]
        order = _rank(self._runs(scores))  # [B, K, C]
        whole = entries // self.chunk
        if self.window_competes:  # kvpress counts runs, not tokens
            whole = (order.shape[-1] * entries // max(width, 1)).clamp(min=1)
        room = torch.where(order < whole, self.chunk, 0)
        if self.fill == "partial":
            room = torch.where(order == whole, entries % self.chunk, room)
        inside = torch.arange(self.chunk, device=scores.device)
        stay = (inside < room[..., None]).flatten(-2)[..., :width]
        too_small = (whole < 1) & (entries < width)
        stay = torch.where(too_small, Token().choose(scores, counts), stay)
        return stay | (entries >= width)

    def _runs(self, scores: Scores) -> Float[Tensor, "B K C"]:
        """Score of each run: [B, K, N] to [B, K, C]."""
        pad = -scores.shape[-1] % self.chunk
        runs = F.pad(scores, (0, pad)).unflatten(-1, (-1, self.chunk)).sum(dim=-1)
        if self.reduce == "sum":
            return runs
        sizes = torch.full_like(runs[0, 0], self.chunk)
        sizes[-1:] -= pad
        return runs / sizes


@dataclass(frozen=True)
class Shot(Unit):
    """Whole shots (in-context examples), the best first, one choice for all heads of a layer.

    A shot's score is the mean over its tokens of the scores summed over heads. What lies in no
    shot is fixed: start token, system message, template, question. The budget pays for it first,
    then for shots in the order of their scores until one does not fit. So a layer may hold much
    less than its budget, and more where the fixed text alone exceeds it.

    Shots are the spans `shots` of the prompt, else its `sentences` (which `kvtrim.generate` and
    `compress` find in any text, if the tokenizer says where its tokens begin). A prompt without
    either, as a bare `kvtrim.Cache` reads it, falls apart into runs of `run` tokens, and none of
    it is fixed.

    Source: ShotKV, https://arxiv.org/abs/2502.01941 v4, section 5.1 and Algorithm 1.
    """

    fill: Literal["stop", "skip"] = "stop"  # at a shot that does not fit: end, or try the others
    min_shots: int = 0  # so many stay even if they exceed the budget
    count_fixed: bool = True  # the budget pays for fixed text too
    reduce: Literal["mean", "first"] = "mean"  # "first": the first token speaks for its shot
    run: int = 16  # tokens per shot where a prompt names none

    def __post_init__(self) -> None:
        if self.run < 1 or self.min_shots < 0:
            raise UsageError(
                f"run={self.run}, min_shots={self.min_shots}: a shot has at least one token, and "
                "no fewer than 0 of them are kept"
            )

    def members(
        self, spans: Sequence[Spans], positions: Int[Tensor, "B K S"]
    ) -> Int[Tensor, "B K S"]:
        """See `Unit.members`."""
        found = positions.long() // self.run
        for row, named in enumerate(spans):
            name = next((name for name in ("shots", "sentences") if named.get(name)), None)
            if name is not None:
                found[row] = unit_numbers(named, name, positions[row])
        return found

    def choose(
        self, scores: Scores, counts: Counts, members: Int[Tensor, "B K N"] | None = None
    ) -> Bool[Tensor, "B K N"]:
        """See `Unit.choose`."""
        if scores.shape[-1] == 0:
            return torch.zeros_like(scores, dtype=torch.bool)
        if members is None:
            slots = torch.arange(scores.shape[-1], device=scores.device)
            members = self.members([], slots.expand(scores.shape))
        rows = zip(scores, members, counts.amin(dim=-1).tolist(), strict=True)
        return torch.stack([self._row(*row) for row in rows])

    def _row(
        self, scores: Float[Tensor, "K N"], members: Int[Tensor, "K N"], room: int
    ) -> Bool[Tensor, "K N"]:
        """The choice for one prompt."""
        there = scores > -torch.inf
        fixed = (members < 0) & there
        if self.count_fixed:
            room = max(0, room - int(fixed.sum(dim=-1).amax()))
        shots = max(0, int(members.amax()) + 1)
        of = members.masked_fill((members < 0) | ~there, shots)  # one more number: in no shot
        values, sizes = self._valued(scores, of, shots)
        sizes, stay = sizes.tolist(), [False] * (shots + 1)
        for rank, shot in enumerate(values.argsort(descending=True, stable=True).tolist()):
            if sizes[shot] <= room or rank < self.min_shots:
                stay[shot], room = True, max(0, room - sizes[shot])
            elif self.fill == "stop":
                break
        return torch.tensor(stay, device=of.device)[of] | fixed

    def _valued(
        self, scores: Float[Tensor, "K N"], of: Int[Tensor, "K N"], shots: int
    ) -> tuple[Float[Tensor, " shots"], Int[Tensor, " shots"]]:
        """Score and size of each shot; -inf for one that holds nothing."""
        empty = scores.new_zeros(len(scores), shots + 1)
        sizes = empty.scatter_add(1, of, torch.ones_like(scores))
        if self.reduce == "first":
            slot = torch.arange(scores.shape[1], device=of.device).expand_as(of)
            first = torch.zeros_like(empty, dtype=torch.int64).scatter_reduce(
                1, of, slot, "amin", include_self=False
            )
            values = scores.gather(1, first)
        else:
            values = empty.scatter_add(1, of, scores) / sizes.clamp(min=1)
        sizes = sizes[:, :shots].amax(dim=0).long()
        return values[:, :shots].sum(dim=0).masked_fill(sizes == 0, -torch.inf), sizes


def _rank(scores: Scores) -> Int[Tensor, "B K N"]:
    """Rank of each candidate, 0 = best; ties to the lower slot."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, ranks)


def select(
    scores: Scores,
    counts: Counts,
    slots: int | Counts,
    *,
    sinks: int = 0,
    recent: int = 0,
    unit: Unit | None = None,
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
        members: the unit each slot belongs to, as `Unit.members` numbers them.
        protected: more slots that always stay.
    """
    unit = unit or Token()
    lengths = slots if isinstance(slots, torch.Tensor) else torch.full(counts.shape, slots)
    if unit.window_competes:
        scores, counts, recent = _raise_window(scores, recent), counts + recent, 0
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
    stay[..., first:last] = unit.choose(competing, counts, of)
    if protected is not None:
        stay |= protected
    if behind is not None:
        stay[..., first:last] |= behind.to(scores.device)
        stay &= (torch.arange(width) < lengths[..., None]).to(scores.device)
    return kept_from_mask(stay)


def _raise_window(scores: Scores, recent: int) -> Float[Tensor, "B K S"]:
    """Give the recent window a score above every other (kvpress)."""
    top = scores.amax(dim=(1, 2), keepdim=True) + 1
    return torch.cat([scores, top.expand(*scores.shape[:2], recent)], dim=-1)


def kept_from_mask(stay: Bool[Tensor, "B K S"]) -> Kept:
    """The survivors of a mask, ascending per head, padded with -1 at the end."""
    counts = stay.sum(dim=-1)
    width = int(counts.max())
    # a stable sort of "is dropped" brings the survivors to the front in their own order
    slots = (~stay).to(torch.uint8).argsort(dim=-1, stable=True)[..., :width]
    padded = torch.arange(width, device=stay.device) < counts[..., None]
    return Kept(slots.masked_fill(~padded, -1), counts.cpu())
