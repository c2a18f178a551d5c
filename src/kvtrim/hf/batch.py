"""Several caches of one model as one batch, so that their continuations share passes.

A pass over one token reads all weights whatever the batch, so continuing 16 caches together takes
little longer than one. Rows are independent; only the last bits of sums may differ from passes
over one row, as they do between any two batch sizes.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from kvtrim.engine import batch
from kvtrim.engine.layer import Call
from kvtrim.errors import CacheError
from kvtrim.hf.cache import Cache, Mark
from kvtrim.types import Float, Int, Tensor


class Abreast(Cache):
    """One prompt after the other as the rows of one cache, each held and evicted as before.

    The model's passes are shared; attention and eviction are those of every row's own cache, which
    is a copy of the one that was given. No padding: every row reads all columns.
    """

    def __init__(self, model: Any, caches: Sequence[Cache]):
        super().__init__(model, "full", 1, granularity=caches[0].method.granularity)
        self.rows = [row for cache in caches for row in _rows(cache)]
        self.rotations = next((row.rotations for row in self.rows if row.rotations), [])
        self._noted()

    @property
    def held_bytes(self) -> int:
        """Bytes held by all rows."""
        return sum(row.held_bytes for row in self.rows)

    @property
    def full_bytes(self) -> int:
        """Bytes that transformers' full cache would hold for all rows."""
        return sum(row.full_bytes for row in self.rows)

    def entries(self) -> list[Int[Tensor, "B K"]]:
        """Entries every head holds now, for each layer."""
        each = [row.entries() for row in self.rows]
        return [torch.cat(layer) for layer in zip(*each, strict=True)]

    def save(self, path: str | os.PathLike[str], tokenizer: Any = None) -> None:
        """Refused: CacheError."""
        raise CacheError("caches that are fed together are saved one by one: save each of them")

    def expect(self, tokens: int) -> None:
        """Take so many tokens of every row as handed over, not generated."""
        for row in self.rows:
            row.expect(tokens)

    # A pass over the model

    def begin_pass(self, rows: int, columns: int, mask: Tensor | None, ids: Tensor | None) -> None:
        """New tokens are coming.

        Raises:
            CacheError: not one row of tokens for each cache, or some of them padding.
        """
        if rows != len(self.rows) or not (mask is None or bool(mask.all())):
            raise CacheError(
                f"{rows} rows came to {len(self.rows)} caches that are fed together, or some were "
                "padded; give one row without padding for each"
            )
        self.session.steps = self  # `attend` below is asked in the place of the session's
        for number, row in enumerate(self.rows):
            row.begin_pass(1, columns, None, None if ids is None else ids[number : number + 1])

    def attend(self, index: int, call: Call) -> Float[Tensor, "B H Q E"]:
        """Every row's attention over what it holds; then it evicts what is due."""
        return torch.cat(
            [row.session.attend(index, call.row(number)) for number, row in enumerate(self.rows)]
        )

    def end_pass(self) -> None:
        """Every layer has attended."""
        self.session.steps = None
        for row in self.rows:
            row.end_pass()
        self._noted()

    # Going back, and other prompts

    def mark(self) -> "Marks":  # pyright: ignore[reportIncompatibleMethodOverride]
        """Remember the state of all rows, and which there are."""
        return Marks(self.rows, [row.mark() for row in self.rows])

    def rewind(self, mark: "Marks") -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return to a marked state, also after an interrupted pass."""
        self.rows, self.session.steps = mark.rows, None
        for row, own in zip(self.rows, mark.own, strict=True):
            row.rewind(own)
        self._noted()

    def crop(self, tokens_to_remove: int | Int[Tensor, ""]) -> None:
        """Take back the newest tokens of all rows, or of none; raises as `Cache.crop`."""
        for row in self.rows:
            row.require_croppable(-int(tokens_to_remove))
        for row in self.rows:
            row.crop(tokens_to_remove)
        self._noted()

    def reset(self) -> None:
        """Forget everything that was read."""
        for row in self.rows:
            row.reset()
        self._noted()

    def copy(self) -> "Abreast":
        """Independent copies of all rows."""
        other = cast(Abreast, super().copy())
        other.rows = [row.copy() for row in self.rows]
        return other

    def _select(self, rows: Tensor) -> None:
        chosen = rows.tolist()
        again = [number in chosen[:place] for place, number in enumerate(chosen)]
        self.rows = [
            self.rows[number].copy() if twice else self.rows[number]
            for number, twice in zip(chosen, again, strict=True)
        ]
        self._noted()

    def _noted(self) -> None:
        """What transformers and the hooks ask of a cache, from those of the rows."""
        state, own = self.session.state, [row.session.state for row in self.rows]
        state.reading.seen = max((one.reading.seen for one in own), default=0)
        state.reading.lengths = [length for one in own for length in one.reading.lengths]
        state.closed_up = [by for one in own for by in one.closed_up or [0]]


@dataclass(frozen=True)
class Marks:
    """States of all rows to come back to."""

    rows: list[Cache]
    own: list[Mark]


def _rows(cache: Cache) -> list[Cache]:
    """A copy of a cache for each of its prompts."""
    if isinstance(cache, Abreast):
        return [row.copy() for row in cache.rows]
    alone = [cache.copy() for _ in cache.session.state.reading.lengths]
    for number, one in enumerate(alone):
        if len(alone) > 1:
            one.batch_select_indices(torch.tensor([number]))
    return alone


Kind = tuple[bool, tuple[int, ...]]


def kind(cache: Cache) -> Kind | None:
    """What tells caches apart that `join` had better not mix; None if it cannot take this one.

    True at first where nothing is evicted any more, so that entries can be put into one store;
    then in how many heads of each layer they are held. Layers that slide, or padding in what was
    read, keep a cache alone.
    """
    if isinstance(cache, Abreast):
        return False, batch.heads(cache.rows[0].session)
    if cache.stock_layers() or not batch.complete(cache.session):
        return None
    return batch.joinable(cache.session), batch.heads(cache.session)


def join(caches: Sequence[Cache]) -> Cache:
    """One cache with the prompts of all of these, in this order; they stay as they are.

    Prompts may be of different lengths: feed `positions(cache, Q)` as `position_ids`, and no mask.
    Those that go on evicting do so as they would alone.

    Raises:
        CacheError: one of them is of no `kind`, or they are of different models or granularity.
    """
    first, model, kinds = caches[0], caches[0].model, [kind(cache) for cache in caches]
    heads = {None if one is None else one[1] for one in kinds}
    same = None not in heads and len(heads) == 1 and all(one.model is model for one in caches)
    if model is None or not same:
        raise CacheError(
            "these caches cannot be continued together: they must be of one model and "
            "granularity, without sliding layers and padding; continue each of them alone"
        )
    if not all(one is not None and one[0] for one in kinds):
        return Abreast(model, caches)
    other = Cache(model, "full", 1, granularity=first.method.granularity)
    other.session.state = batch.joined([cache.session for cache in caches])
    return other


def positions(cache: Cache, columns: int) -> Int[Tensor, "B Q"]:
    """Where the next tokens of every prompt stand."""
    lengths = torch.tensor(cache.session.state.reading.lengths)
    return lengths[:, None] + torch.arange(columns)
