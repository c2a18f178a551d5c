"""What is kept or dropped as a whole: a token, a chunk of neighbours, a shot of the prompt."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from kvtrim.methods.ranges import Declared, Some, Tokens
from kvtrim.methods.unit_numbers import unit_numbers
from kvtrim.types import Bool, Counts, Float, Int, Scores, Spans, Tensor


class Unit(Declared, ABC):
    """What is kept or dropped as a whole. Subclasses are frozen dataclasses."""

    window_competes: bool = False
    """The recent window is not set apart but ranked, above all other scores (kvpress)."""

    single: ClassVar[bool] = False
    """Each slot stands for itself, so that cutting twice equals cutting once."""

    @property
    def holds_more(self) -> str:
        """Why clearly more than `keep` may stay, for the user; empty if it does not."""
        return ""

    @property
    def holds_less(self) -> str:
        """Why clearly less may stay."""
        return ""

    def members(
        self, spans: Sequence[Spans], positions: Int[Tensor, "B K S"]
    ) -> Int[Tensor, "B K S"] | None:
        """The number of each slot's unit, for units that the prompt names; -1 is fixed."""
        return None

    @abstractmethod
    def choose(
        self, scores: Scores, counts: Counts, members: Int[Tensor, "B K N"] | None = None
    ) -> Bool[Tensor, "B K N"]:
        """Which candidates stay, at most `counts` [B, K] per head; -inf is no candidate."""


@dataclass(frozen=True)
class Token(Unit):
    """Token: every slot is kept or dropped by itself."""

    single: ClassVar[bool] = True

    def choose(
        self, scores: Scores, counts: Counts, members: Int[Tensor, "B K N"] | None = None
    ) -> Bool[Tensor, "B K N"]:
        """See `Unit.choose`."""
        return highest(scores, counts)


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

    chunk: Some = 10  # tokens per run
    reduce: Literal["sum", "mean"] = "sum"  # of the scores in a run
    fill: Literal["none", "partial"] = "none"  # entries no whole run fits into: unused, or the
    # leading tokens of the next best run
    shared: bool = False  # one set for all heads of the layer, by the sum of their scores
    window_competes: bool = False

    @property
    def holds_more(self) -> str:
        """See `Unit.holds_more`."""
        return "runs are counted, not tokens, and one always stays" if self.window_competes else ""

    @property
    def holds_less(self) -> str:
        """See `Unit.holds_less`."""
        if self.fill == "partial":
            return ""
        return f"entries that no whole run of {self.chunk} tokens fits into stay unused"

    def choose(
        self, scores: Scores, counts: Counts, members: Int[Tensor, "B K N"] | None = None
    ) -> Bool[Tensor, "B K N"]:
        """See `Unit.choose`."""
        width = scores.shape[-1]
        if self.chunk > max(1, width):  # one run, whatever its length
            return replace(self, chunk=max(1, width)).choose(scores, counts)
        if self.shared:  # slots that a head does not have count nothing
            absent = scores.isneginf()
            shared = scores.masked_fill(absent, 0).sum(dim=1, keepdim=True)
            scores = shared.expand_as(scores).masked_fill(absent, -torch.inf)
        entries = counts.to(scores.device)[..., None]  # [B, K, 1]
        there = (~scores.isneginf()).sum(dim=-1, keepdim=True)  # slots that a head has
        order = ranks(self._runs(scores))  # [B, K, C]
        whole = entries // self.chunk
        if self.window_competes:  # kvpress counts runs, not tokens
            runs = -(-there // self.chunk)
            whole = (runs * entries // there.clamp(min=1)).clamp(min=1)
        room = torch.where(order < whole, self.chunk, 0)
        if self.fill == "partial":
            room = torch.where(order == whole, entries % self.chunk, room)
        inside = torch.arange(self.chunk, device=scores.device)
        stay = (inside < room[..., None]).flatten(-2)[..., :width]
        too_small = (whole < 1) & (entries < there)
        stay = torch.where(too_small, Token().choose(scores, counts), stay)
        return stay | (entries >= there)

    def _runs(self, scores: Scores) -> Float[Tensor, "B K C"]:
        """Score of each run, over the slots that a head has: [B, K, N] to [B, K, C]."""
        pad = -scores.shape[-1] % self.chunk
        runs = F.pad(scores, (0, pad), value=-torch.inf).unflatten(-1, (-1, self.chunk))
        absent = runs.isneginf()
        sums, sizes = runs.masked_fill(absent, 0).sum(dim=-1), (~absent).sum(dim=-1)
        values = sums if self.reduce == "sum" else sums / sizes.clamp(min=1)
        return values.masked_fill(sizes == 0, -torch.inf)


@dataclass(frozen=True)
class Shot(Unit):
    """Whole shots (in-context examples), the best first, one choice for all heads of a layer.

    A shot's score is the mean over its tokens of the scores summed over heads. What lies in no
    shot is fixed: start token, system message, template, question. The budget pays for it first,
    then for shots in the order of their scores until one does not fit. So a layer may hold much
    less than its budget. Where the fixed text alone exceeds it, that text stays and the share
    of the prompt that was asked for is kept of the shots, as the paper's ratio is of them; the
    layer then holds more than its budget.

    Shots are the spans `shots` of the prompt, else its `sentences` (which `kvtrim.generate` and
    `compress` find in any text, if the tokenizer says where its tokens begin). A prompt without
    either, as a bare `kvtrim.Cache` reads it, falls apart into runs of `run` tokens, and none of
    it is fixed.

    Source: ShotKV, https://arxiv.org/abs/2502.01941 v4, section 5.1 and Algorithm 1.
    """

    fill: Literal["stop", "skip"] = "stop"  # at a shot that does not fit: end, or try the others
    min_shots: Tokens = 0  # so many stay even if they exceed the budget
    count_fixed: bool = True  # the budget pays for fixed text too
    reduce: Literal["mean", "first"] = "mean"  # "first": the first token speaks for its shot
    run: Some = 16  # tokens per shot where a prompt names none

    @property
    def holds_more(self) -> str:
        """See `Unit.holds_more`."""
        return "the text outside the shots stays, and the share asked for is kept of the shots"

    @property
    def holds_less(self) -> str:
        """See `Unit.holds_less`."""
        return "shots stay or go as a whole, and the next best one does not fit"

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
            around, total = (int(part.sum(dim=-1).amax()) for part in (fixed, there))
            room = room - around if around <= room else room * (total - around) // max(1, total)
        shots = max(0, int(members.amax()) + 1)
        of = members.masked_fill((members < 0) | ~there, shots)  # one more number: in no shot
        values, sizes = self._value_shots(scores, of, shots)
        sizes, stay = sizes.tolist(), [False] * (shots + 1)
        for rank, shot in enumerate(values.argsort(descending=True, stable=True).tolist()):
            if sizes[shot] <= room or rank < self.min_shots:
                stay[shot], room = True, max(0, room - sizes[shot])
            elif self.fill == "stop":
                break
        return torch.tensor(stay, device=of.device)[of] | fixed

    def _value_shots(
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


def highest(scores: Float[Tensor, "*B N"], counts: Int[Tensor, "*B"]) -> Bool[Tensor, "*B N"]:
    """The best `counts` of each row, of equal scores the first; all of a row that has fewer.

    Args:
        counts: on the CPU, wherever the scores are.
    """
    if not scores.shape[-1]:
        return torch.zeros_like(scores, dtype=torch.bool)
    counts = counts.clamp(min=0, max=scores.shape[-1])
    places = (counts - 1).clamp(min=0)
    on_cpu = scores.device.type == "cpu"
    least = (selected_value if on_cpu else sorted_value)(scores, places)
    least = least.masked_fill((counts == 0).to(scores.device), torch.inf)[..., None]
    above, level = scores > least, scores == least
    missing = counts.to(scores.device)[..., None] - above.sum(dim=-1, keepdim=True)
    return above | (level & (level.cumsum(dim=-1) <= missing))


def sorted_value(scores: Float[Tensor, "*B N"], places: Int[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """The score in this place of each row, 0 for the best; all rows at once."""
    ordered = scores.sort(dim=-1, descending=True).values
    return ordered.gather(-1, places[..., None].to(scores.device))[..., 0]


def selected_value(
    scores: Float[Tensor, "*B N"], places: Int[Tensor, "*B"]
) -> Float[Tensor, "*B"]:
    """The same, row by row: on a CPU several times faster than to sort."""
    rows = zip(scores.flatten(0, -2), places.flatten().tolist(), strict=True)
    found = [row.kthvalue(len(row) - place).values for row, place in rows]
    return torch.stack(found).view(places.shape)


def ranks(scores: Float[Tensor, "*B N"]) -> Int[Tensor, "*B N"]:
    """The place of each score in its row, 0 for the best; of equal scores the first is better."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)
