"""From scores and counts to the slots that survive. The only owner of sinks, window, ties and
units.

Sinks (first slots) and the recent window (last slots) are kept outside the ranking, never by
raising their scores. Equal scores: the lower slot wins. Survivors are in ascending order.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from kvtrim.errors import UsageError
from kvtrim.types import Bool, Counts, Float, Int, Kept, Scores, Tensor


class Unit(ABC):
    """What is kept or dropped as a whole. Subclasses are frozen dataclasses."""

    window_competes: bool = False
    """The recent window is not set apart but enters the ranking above all other scores
    (kvpress).
    """

    single: ClassVar[bool] = False
    """Each slot stands for itself, so that cutting twice equals cutting once."""

    @abstractmethod
    def choose(self, scores: Scores, counts: Counts) -> Bool[Tensor, "B K N"]:
        """Which candidates stay, at most `counts` [B, K] per head."""


@dataclass(frozen=True)
class Token(Unit):
    """Token: every slot is kept or dropped by itself."""

    single: ClassVar[bool] = True

    def choose(self, scores: Scores, counts: Counts) -> Bool[Tensor, "B K N"]:
        """See `Unit.choose`."""
        return _rank(scores) < counts.to(scores.device)[..., None]


@dataclass(frozen=True)
class Chunk(Unit):
    """Chunk: runs of consecutive tokens are kept or dropped as a whole.

    Rule:  runs of `chunk` candidates are ranked by the sum of their scores and the best ones stay.
           The last run may be shorter. A head whose budget is smaller than one run falls back to
           single tokens.
    Paper: Liu et al. 2025 (ChunkKV), https://arxiv.org/abs/2502.00299, Algorithm 1.
    Code:  NVIDIA/kvpress@8bb29b9, presses/chunkkv_press.py, is `window_competes`, `shared` and
           reduce="mean" together.
    """

    chunk: int = 10  # tokens per run
    reduce: Literal["sum", "mean"] = "sum"  # of the scores in a run
    fill: Literal["none", "partial"] = "none"  # entries no whole run fits into: unused, or the
    # leading tokens of the next best run
    shared: bool = False  # one set for all heads of the layer, by the sum of their scores
    window_competes: bool = False

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise UsageError(f"a chunk has at least one token, got chunk={self.chunk}")

    def choose(self, scores: Scores, counts: Counts) -> Bool[Tensor, "B K N"]:
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
class SecondStage:
    """The last entries of each head are chosen by other scores than the first."""

    first: Counts  # how many candidates the first scores choose
    scores: Scores  # of the same slots as the first


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
    second: SecondStage | None = None,
) -> Kept:
    """Choose the survivors among `slots` slots per head.

    Args:
        scores: [B, K, N] of the first N slots; N reaches at least to the recent window.
        counts: [B, K] candidates to keep beside sinks and window.
        slots: slots per head, one number or [B, K] where heads differ.
        sinks, recent: first and last slots that always stay.
        unit: what is kept as a whole; tokens by default.
        second: other scores for the last entries; only the first scores choose by default.
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
    counts = counts.minimum((ends - first).clamp(min=0))
    stay = torch.ones(*counts.shape, width, dtype=torch.bool, device=scores.device)
    stay[..., first:last] = _chosen(unit, competing, counts, second, slice(first, last))
    if behind is not None:
        stay[..., first:last] |= behind.to(scores.device)
        stay &= (torch.arange(width) < lengths[..., None]).to(scores.device)
    return kept_from_mask(stay)


def _chosen(
    unit: Unit, scores: Scores, counts: Counts, second: SecondStage | None, competing: slice
) -> Bool[Tensor, "B K N"]:
    if second is None:
        return unit.choose(scores, counts)
    stay = unit.choose(scores, counts.minimum(second.first))
    others = second.scores[..., competing].masked_fill(stay | scores.isneginf(), -torch.inf)
    return stay | unit.choose(others, counts - stay.sum(dim=-1).cpu())


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
