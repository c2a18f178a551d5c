"""Several caches of one model as one batch, so that their continuations share passes.

A pass over one token reads all weights whatever the batch, so continuing 16 caches together takes
little longer than one. Rows are independent; only the last bits of sums may differ from passes
over one row, as they do between any two batch sizes.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvtrim.engine import batch
from kvtrim.engine.layer import Attends, Call
from kvtrim.errors import CacheError
from kvtrim.hf.base import BaseCache, Coming
from kvtrim.hf.cache import Cache, Mark
from kvtrim.hf.layers import ManagedLayer
from kvtrim.types import Float, Int, Tensor


@dataclass
class _Read:
    """What the layers of a batch tell transformers."""

    seen: int = 0
    recording: bool = False


class Batch(BaseCache):
    """Independent caches of one model, fed together: one prompt after the other as its rows.

    The model's passes are shared; attention and eviction are those of every row's own cache, which
    is a copy of the one that was given. No padding: every row reads all columns.
    """

    def __init__(self, model: Any, caches: Sequence[BaseCache]):
        self.rows = [row for cache in caches for row in _rows(cache)]
        self._read = _Read(max((row.seen for row in self.rows), default=0))
        layers = [ManagedLayer(self._read) for _ in self.rows[0].layers]
        super().__init__(model, copy.copy(self.rows[0].rope), layers)
        self.rope.beyond = None
        self.rotations = next((row.rotations for row in self.rows if row.rotations), [])

    @property
    def seen(self) -> int:
        return self._read.seen

    @property
    def lengths(self) -> list[int]:
        return [length for row in self.rows for length in row.lengths]

    @property
    def closed_up(self) -> list[int]:
        return [by for row in self.rows for by in row.closed_up or [0]]

    @property
    def held_bytes(self) -> int:
        return sum(row.held_bytes for row in self.rows)

    @property
    def full_bytes(self) -> int:
        return sum(row.full_bytes for row in self.rows)

    def entries(self) -> list[Int[Tensor, "B K"]]:
        each = [row.entries() for row in self.rows]
        return [torch.cat(layer) for layer in zip(*each, strict=True)]

    def save(self, path: Any, tokenizer: Any = None) -> None:
        """Refused: CacheError."""
        raise CacheError("caches that are fed together are saved one by one: save each of them")

    def expect(self, tokens: int) -> None:
        for row in self.rows:
            row.expect(tokens)

    # A pass over the model

    def take_announcement(self) -> bool:
        return False

    def begin_pass(self, coming: Coming) -> None:
        """New tokens are coming.

        Raises:
            CacheError: not one row of tokens for each cache, or some of them padding.
        """
        mask, ids = coming.mask, coming.ids
        if coming.rows != len(self.rows) or not (mask is None or bool(mask.all())):
            raise CacheError(
                f"{coming.rows} rows came to {len(self.rows)} caches that are fed together, or "
                "some were padded; give one row without padding for each"
            )
        for number, row in enumerate(self.rows):
            own = None if ids is None else ids[number : number + 1]
            row.begin_pass(Coming(1, coming.columns, None, own))

    def attend(self, index: int, call: Call) -> Float[Tensor, "B H Q E"]:
        """Every row's attention over what it holds; then it evicts what is due."""
        return torch.cat(
            [row.attends.attend(index, call.row(number)) for number, row in enumerate(self.rows)]
        )

    @property
    def attends(self) -> Attends:
        return self

    def end_pass(self) -> bool:
        for row in self.rows:
            row.end_pass()
        self._count()
        return False

    # Going back, and other prompts

    def mark(self) -> "Marks":
        """Remember the state of all rows, and which there are."""
        return Marks(self.rows, [row.mark() for row in self.rows])

    def rewind(self, mark: "Marks") -> None:
        """Return to a marked state, also after an interrupted pass."""
        self.rows = mark.rows
        for row, own in zip(self.rows, mark.own, strict=True):
            row.rewind(own)
        self._count()

    def require_croppable(self, count: int) -> None:
        for row in self.rows:
            row.require_croppable(count)

    def take_back(self, count: int) -> None:
        for row in self.rows:
            row.crop(-count)
        self._count()

    def reset(self) -> None:
        for row in self.rows:
            row.reset()
        self._count()

    def copy(self) -> "Batch":
        other = object.__new__(Batch)
        vars(other).update(vars(self))
        other.rows = [row.copy() for row in self.rows]
        other._read, other.rope = copy.copy(self._read), copy.copy(self.rope)
        other.layers = [ManagedLayer(other._read) for _ in self.layers]
        return other

    def select_rows(self, rows: Int[Tensor, " R"]) -> None:
        chosen = rows.tolist()
        again = [number in chosen[:place] for place, number in enumerate(chosen)]
        self.rows = [
            self.rows[number].copy() if twice else self.rows[number]
            for number, twice in zip(chosen, again, strict=True)
        ]
        self._count()

    def _count(self) -> None:
        self._read.seen = max(row.seen for row in self.rows)


@dataclass(frozen=True)
class Marks:
    """States of all rows to come back to."""

    rows: list[Cache]
    own: list[Mark]


def _rows(cache: BaseCache) -> list[Cache]:
    """A copy of a cache for each of its prompts."""
    if isinstance(cache, Batch):
        return [row.copy() for row in cache.rows]
    if not isinstance(cache, Cache):
        raise CacheError(f"{type(cache).__name__} is no cache of prompts")
    alone = [cache.copy() for _ in cache.lengths]
    for number, one in enumerate(alone):
        if len(alone) > 1:
            one.batch_select_indices(torch.tensor([number]))
    return alone


Kind = tuple[bool, tuple[int, ...]]


def kind(cache: BaseCache) -> Kind | None:
    """What tells caches apart that `join` had better not mix; None if it cannot take this one.

    True at first where nothing is evicted any more, so that entries can be put into one store;
    then in how many heads of each layer they are held. Layers that slide, or padding in what was
    read, keep a cache alone.
    """
    if isinstance(cache, Batch):
        return False, batch.heads(cache.rows[0].session)
    if not isinstance(cache, Cache) or cache.stock_layers() or not batch.complete(cache.session):
        return None
    return batch.joinable(cache.session), batch.heads(cache.session)


def join(caches: Sequence[BaseCache]) -> BaseCache:
    """One cache with the prompts of all of these, in this order; they stay as they are.

    Prompts may be of different lengths: feed `positions(cache, Q)` as `position_ids`, and no mask.
    Those that go on evicting do so as they would alone.

    Raises:
        CacheError: one of them is of no `kind`, or they are of different models or granularity.
    """
    model, kinds = caches[0].model, [kind(cache) for cache in caches]
    heads = {None if one is None else one[1] for one in kinds}
    same = None not in heads and len(heads) == 1 and all(one.model is model for one in caches)
    if model is None or not same:
        raise CacheError(
            "these caches cannot be continued together: they must be of one model and "
            "granularity, without sliding layers and padding; continue each of them alone"
        )
    single = [cache for cache in caches if isinstance(cache, Cache)]
    if len(single) < len(caches) or not all(one is not None and one[0] for one in kinds):
        return Batch(model, caches)
    other = Cache(model, "full", 1, granularity=single[0].method.granularity)
    other.session.state = batch.join([cache.session for cache in single])
    return other


def positions(cache: BaseCache, columns: int) -> Int[Tensor, "B Q"]:
    """Where the next tokens of every prompt stand."""
    lengths = torch.tensor(cache.lengths)
    return lengths[:, None] + torch.arange(columns)
