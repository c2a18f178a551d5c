"""Tokens of many caches as one row of one pass: prompts and answers of any lengths together.

A pass over one token reads all weights, whatever else goes through it. So the new tokens of
whoever has any are laid one behind the other; only attention knows whose they are.

Where the same branches get one token each, pass after pass, as answers do, each gets a seat
(`hf/seats.py`), so that on CUDA the pass is a captured graph.
"""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F

from kvtrim.engine.branch import Base, Branch
from kvtrim.engine.layer import Attends, Call
from kvtrim.engine.row import Row
from kvtrim.errors import CacheError
from kvtrim.hf.base import BaseCache, Coming, cache_keyword
from kvtrim.hf.cache import Cache
from kvtrim.hf.decode import LEAST, is_spread
from kvtrim.hf.layers import ManagedLayer, WindowLayer
from kvtrim.hf.seats import Seats
from kvtrim.kernels.parts import attend_part
from kvtrim.types import Float, Int, Tensor

log = logging.getLogger("kvtrim.hf")

_PAUSE = 64  # passes

_FEW, _FULL = 9, 16
"""On a CPU a product of few rows is made row by row: 9 take as long as 16, and 15 up to twice."""


@dataclass(frozen=True)
class Feed:
    """The next tokens of one cache or branch."""

    into: Branch | Cache
    ids: list[int]


def position(into: Branch | Cache) -> int:
    """Where the next token of a branch or of a cache of one prompt stands."""
    return into.position if isinstance(into, Branch) else sum(into.ends)


@dataclass
class _Read:
    """What layers tell transformers: not the beginning of a prompt, whatever comes."""

    seen: int = 1
    recording: bool = False


def _rows(count: int, device: torch.device) -> int:
    """How many rows to multiply weights by, where so many are needed."""
    return _FULL if device.type == "cpu" and _FEW <= count < _FULL else count


@dataclass
class _Windows:
    """What stands behind the attention of layers that slide."""

    pack: "Pack"

    def attend(self, index: int, call: Call) -> Float[Tensor, "B H Q E"]:
        """Of the layer of this number among them."""
        return self.pack.attend_window(index, call)


def base_of(cache: Cache) -> Base:
    """The entries of a cache of one prompt, shared by whoever continues it.

    Raises:
        CacheError: as `Base`; or it was read beyond the length at which the model's RoPE changes.
    """
    cache.rope.require_below(cache.ends)
    windows = []
    for number, layer in enumerate(cast(list[Any], cache.layers)):
        if isinstance(layer, WindowLayer):
            windows.append((number, *layer.last()))
    return Base(cache.session, windows)


class Pack(BaseCache):
    """What a pass over several feeds reads into. The model has to be attached.

    Caches among them have one prompt each, which is read. Nothing is held here between passes but
    empty seats.

    Args:
        seats: give branches that get one token each, pass after pass, seats of their own. By
            default where that can be captured, on CUDA.
    """

    def __init__(self, model: Any, seats: bool | None = None):
        like, self._read = Cache(model, "full", 1), _Read()
        super().__init__(model, copy.copy(like.rope), [])
        self._seats: Seats | None = None
        self._before: set[int] = set()  # identities of the branches of the last pass
        self.captures = 0  # how often seats were taken, which takes about three passes
        self._pause = 0  # passes until seats are tried again, after memory was short
        self._managed = like.managed
        rest = [n for n in range(len(like.layers)) if n not in set(like.managed)]
        self._windows = [(n, cast(Any, like.layers[n]).sliding_window) for n in rest]
        self.layers = [ManagedLayer(self._read) for _ in like.layers]
        self.gives_seats = model.device.type == "cuda" if seats is None else seats
        if self._windows or is_spread(model) or self.rope.switch is not None:
            self.gives_seats = False
        self._row, self._end = Row([]), 0
        self._caches: list[tuple[Cache, slice]] = []

    def feed(self, model: Any, feeds: Sequence[Feed]) -> Float[Tensor, "N vocabulary"]:
        """One pass; logits after the last token of each feed, overwritten by the next pass.

        If it fails branches are as before, and caches are of no use any more.

        Raises:
            CacheError: the model's RoPE changes with the length, and a feed goes that far.
            torch.OutOfMemoryError: the pass does not fit.
        """
        seats = self._seats_of(model, feeds) if self.gives_seats else None
        if seats is not None:
            return seats.step([(cast(Branch, each.into), each.ids[0]) for each in feeds])
        own = [(each.into, len(each.ids)) for each in feeds]
        self._row = row = Row([(into, n) for into, n in own if isinstance(into, Branch)])
        columns, end = dict(row.columns), row.end
        self._caches = []
        for each in feeds:
            if isinstance(each.into, Cache):
                columns[id(each.into)] = part = slice(end, end + len(each.ids))
                self._caches.append((each.into, part))
                end = part.stop
        device = model.device
        self._end, width = end, _rows(end, device)
        ids, at = [0] * width, [0] * width  # what is nobody's is left at that
        for each in feeds:
            part, start = columns[id(each.into)], position(each.into)
            ids[part], at[part] = each.ids, range(start, start + len(each.ids))
        turning = (cache.rotations for cache, _ in self._caches)
        self.rotations = next((own for own in turning if own), [])
        last = [columns[id(each.into)].stop - 1 for each in feeds]
        last += last[-1:] * (_rows(len(feeds), device) - len(feeds))
        try:
            with torch.no_grad():
                out = model(
                    input_ids=torch.tensor([ids], device=device),
                    position_ids=torch.tensor([at], device=device),
                    **cache_keyword(self),
                    logits_to_keep=torch.tensor(last, device=device),
                )
        finally:
            self._row, self._end, self._caches = Row([]), 0, []
        for each in feeds:
            if isinstance(each.into, Branch):
                each.into.ids += each.ids
        return out.logits[0, : len(feeds)]

    def _seats_of(self, model: Any, feeds: Sequence[Feed]) -> Seats | None:
        """Where each feed has a seat; None where a pass of another kind is due."""
        branches = [feed.into for feed in feeds if isinstance(feed.into, Branch)]
        single = len(branches) == len(feeds) and all(len(feed.ids) == 1 for feed in feeds)
        if not single or not all(branch.ids for branch in branches):
            self._before = set()
            self.leave_seats()
            return None
        if self._seats is not None and self._seats.are_of(branches):
            return self._seats
        self.leave_seats()
        before, self._before = self._before, {id(branch) for branch in branches}
        ahead = sorted(branch.room - len(branch.ids) for branch in branches)
        self._pause = max(0, self._pause - 1)
        if not self._before <= before or not ahead[0] or ahead[len(ahead) // 2] < LEAST:
            return None
        return None if self._pause else self._take_seats(model, branches)

    def _take_seats(self, model: Any, branches: Sequence[Branch]) -> Seats | None:
        """New ones; None if that cannot be, or there is no memory for it."""
        try:
            seats = Seats(branches)
            self._row, self._end = seats.row, seats.count
            seats.capture(model, self)
        except torch.OutOfMemoryError as error:
            log.warning("steps are not captured for now: %s", error)
            self._row, self._end, self._pause = Row([]), 0, _PAUSE
            return None
        if seats.plain is not None and model.device.type == "cuda":
            log.warning("steps are not captured: the pass %s", seats.plain)
            self.gives_seats = False
            return None
        self._seats, self.captures = seats, self.captures + 1
        return seats

    @property
    def has_seats(self) -> bool:
        """Whether the branches of the last pass sit."""
        return self._seats is not None

    @property
    def empty_bytes(self) -> int:
        """What empty seats hold; `leave_seats` gives it back."""
        seats = self._seats  # which the scheduler's thread may give up while another asks
        return 0 if seats is None else seats.empty_bytes

    def leave_seats(self) -> None:
        """Nobody sits any more; all go on in a pass of the usual kind."""
        seats, self._seats = self._seats, None
        if seats is not None:
            self._row, self._end = Row([]), 0
            seats.vacate()

    def leave(self, into: Branch | Cache) -> None:
        """It gets no more tokens."""
        if self._seats is not None and not self._seats.leave(into):
            self.leave_seats()

    def begin_pass(self, coming: Coming) -> None:
        for cache, part in self._caches:
            own = None if coming.ids is None else coming.ids[:, part]
            cache.begin_pass(Coming(1, part.stop - part.start, None, own))

    def attend(self, index: int, call: Call) -> Float[Tensor, "1 H Q E"]:
        """Every feed's attention over what it holds; then evict what is due."""
        parts = [cache.attends.attend(index, call.columns(part)) for cache, part in self._caches]
        if self._row.end:
            parts.insert(0, self._row.attend(self._managed[index], call))
        return self._fill(parts, call)

    def attend_window(self, index: int, call: Call) -> Float[Tensor, "1 H Q E"]:
        """Likewise in a layer that slides, by its number among those."""
        number, window = self._windows[index]
        parts = []
        if self._row.end:
            parts.append(self._row.attend(number, call, window))
        for cache, part in self._caches:
            own = call.columns(part)
            held = cast(Any, cache.layers[number]).update(own.keys, own.values)
            given = own.queries, held[0], held[1], own.scale, own.softcap
            out, _ = attend_part(*given, causal=True, window=window)
            parts.append(out.to(own.queries.dtype))
        return self._fill(parts, call)

    def _fill(self, parts: list[Tensor], call: Call) -> Float[Tensor, "1 H Q E"]:
        """All of it, and nothing for tokens that fill the row up."""
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        return F.pad(out, (0, 0, 0, call.queries.shape[2] - self._end))

    @property
    def windows(self) -> Attends | None:
        return _Windows(self)

    @property
    def attends(self) -> Attends:
        return self

    def end_pass(self) -> bool:
        for cache, _ in self._caches:
            cache.end_pass()
        return False

    def take_announcement(self) -> bool:
        return False

    @property
    def seen(self) -> int:
        return self._read.seen

    @property
    def lengths(self) -> list[int]:
        return [self._read.seen]

    @property
    def closed_up(self) -> list[int]:
        return []

    @property
    def held_bytes(self) -> int:
        return 0

    @property
    def full_bytes(self) -> int:
        return 0

    def entries(self) -> list[Int[Tensor, "B K"]]:
        return []

    # What a pack is not asked

    def expect(self, tokens: int) -> None:
        self._refuse()

    def mark(self) -> Any:
        self._refuse()

    def rewind(self, mark: Any) -> None:
        self._refuse()

    def require_croppable(self, count: int) -> None:
        self._refuse()

    def take_back(self, count: int) -> None:
        self._refuse()

    def reset(self) -> None:
        self._refuse()

    def copy(self) -> "Pack":
        self._refuse()

    def select_rows(self, rows: Int[Tensor, " R"]) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise CacheError("a pack holds nothing between passes; ask the caches that it feeds")
