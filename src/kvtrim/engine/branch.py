"""A prompt that was read once, and what several continuations each add to it.

The prompt's entries are held once, however many continue it, and never change: a continuation
writes its own behind them. Attention over both parts is joined by log-sum-exps. So a continuation
costs what it adds, may be cut back to any length, and all that continue one prompt go through its
entries together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kvtrim.cache.store import BIAS, LayerStore
from kvtrim.engine.batch import joinable
from kvtrim.engine.layer import Call
from kvtrim.engine.session import Session
from kvtrim.errors import CacheError
from kvtrim.kernels.parts import Part, attend_last, attend_part
from kvtrim.types import Float, Int, Tensor

_ROOM = 32  # entries that a continuation's buffers grow by at least

Run = tuple[Tensor, Tensor, Tensor | None]
"""K, V and biases [1, K, S, ...] of heads that hold equally many entries."""


class Base:
    """The entries of one prompt, as they are when it was read and cut.

    `below` is what they continue themselves, if anything.

    Args:
        session: one that evicts no more (`engine.batch.joinable`), of one prompt; not to be used
            any further by others.
        windows: layers that slide: their numbers among all, ascending, and K and V
            [1, K, S, ...] of the last tokens, one fewer than their windows take.

    Raises:
        CacheError: it is none of these.
    """

    below: "Base | None" = None

    def __init__(self, session: Session, windows: Sequence[tuple[int, Tensor, Tensor]] = ()):
        if not joinable(session) or len(session.state.reading.lengths) != 1:
            raise CacheError("only one prompt that nothing is evicted from any more can be shared")
        self.tokens = session.state.reading.lengths[0]
        self.position = self.tokens - sum(session.state.closed_up)  # of what comes next
        self.held_bytes, self.full_bytes = session.state.held_bytes, session.state.full_bytes
        stores = session.state.stores()
        for store in stores:
            store.settle()
        self.counts = [store.length[0].tolist() for store in stores]
        self._layers = [_runs(store) for store in stores]
        for number, keys, values in windows:
            self._layers.insert(number, [(keys, values, None)])

    def attend(self, index: int, call: Call, queries: Float[Tensor, "1 H N D"]) -> Part | None:
        """What queries of any continuations find in one layer; None where it holds nothing."""
        runs = self._layers[index]
        if len(runs) == 1:
            keys, values, bias = runs[0]
            if not keys.shape[2]:
                return None
            return attend_part(queries, keys, values, call.scale, call.softcap, bias)
        group, parts = queries.shape[1] // len(runs), []
        for head, (keys, values, bias) in enumerate(runs):
            own = queries[:, head * group : (head + 1) * group]
            if keys.shape[2]:
                parts.append(attend_part(own, keys, values, call.scale, call.softcap, bias))
            else:
                nothing = own.new_zeros(*own.shape[:3], values.shape[-1])
                parts.append((nothing, torch.full_like(nothing[..., 0], -torch.inf)))
        outs, lses = zip(*parts, strict=True)
        wide = torch.promote_types(outs[0].dtype, lses[0].dtype)
        return torch.cat([out.to(wide) for out in outs], dim=1), torch.cat(lses, dim=1)

    def attend_window(
        self,
        index: int,
        call: Call,
        queries: Float[Tensor, "1 H N D"],
        counts: Int[Tensor, " N"],
    ) -> Part:
        """What queries find in a layer that slides: each in its last so many entries."""
        keys, values, _ = self._layers[index][0]
        return attend_last(queries, keys, values, call.scale, call.softcap, counts)


def _runs(store: LayerStore) -> list[Run]:
    """The heads of one prompt's store: all together if they are of one length, else each alone."""
    bias = store.buffers.get(BIAS)
    if store.width is not None:
        keys, values = store.keys_and_values()
        return [(keys, values, None if bias is None else store.column(BIAS))]
    runs = []
    for start, length in zip(store.start[0].tolist(), store.length[0].tolist(), strict=True):
        part = slice(start, start + length)
        own = None if bias is None else bias[None, None, part]
        runs.append((store.keys[None, None, part], store.values[None, None, part], own))
    return runs


@dataclass(eq=False)
class Stack:
    """One layer's entries of several continuations, a row each; zeros where none was written."""

    keys: Float[Tensor, "N K S D"]
    values: Float[Tensor, "N K S E"]


@dataclass(eq=False)
class Tail:
    """One layer's entries of a continuation; room behind them for more."""

    keys: Float[Tensor, "1 K S D"]
    values: Float[Tensor, "1 K S E"]
    place: tuple[Stack, int] | None = None  # the stack and the row that they are, if they are one

    @property
    def nbytes(self) -> int:
        """Bytes of both, room included."""
        return self.keys.nbytes + self.values.nbytes


@dataclass
class Branch:
    """One continuation of a prompt, or of nothing: its tokens, and their entries in each layer."""

    base: Base | None = None
    ids: list[int] = field(default_factory=list)  # whose entries are held
    tails: list[Tail] = field(default_factory=list)
    room: int = 0  # entries that there will be, if that is known: buffers are made for so many
    shared: int = 0  # of its first entries, which others continue: they are never written over

    @property
    def position(self) -> int:
        """Of the next token."""
        return len(self.ids) + (self.base.position if self.base else 0)

    @property
    def bases(self) -> list[Base]:
        """What it continues, beginning with what continues nothing."""
        chain, base = [], self.base
        while base is not None:
            chain.insert(0, base)
            base = base.below
        return chain

    @property
    def nbytes(self) -> int:
        """Bytes of its own entries."""
        return sum(tail.nbytes for tail in self.tails)

    def append(
        self, index: int, keys: Float[Tensor, "1 K Q D"], values: Float[Tensor, "1 K Q E"]
    ) -> tuple[Tensor, Tensor]:
        """Write new tokens' entries behind the others; K and V of all of them.

        They count once `ids` says so: a pass that fails leaves nothing behind.
        """
        length, count = len(self.ids), keys.shape[2]
        if index == len(self.tails):
            self.tails.append(Tail(keys[:, :, :0], values[:, :, :0]))
        tail = self.tails[index]
        if length + count > tail.keys.shape[2]:
            capacity = max(self.room, length + count, length + max(_ROOM, length // 4))
            tail = self.tails[index] = Tail(
                _grow(tail.keys, keys, length, capacity),
                _grow(tail.values, values, length, capacity),
            )
        part = slice(length, length + count)
        tail.keys[:, :, part], tail.values[:, :, part] = keys, values
        return tail.keys[:, :, : part.stop], tail.values[:, :, : part.stop]

    def crop(self, length: int) -> None:
        """Forget all but its first tokens."""
        if length < self.shared:
            self.tails, self.shared = self.copy(length, self.room).tails, 0
        del self.ids[length:]

    def unstack(self) -> None:
        """Have entries of its own, which do not keep those of others from being freed."""
        if any(tail.place is not None for tail in self.tails):
            self.tails = self.copy(len(self.ids), self.room).tails

    def copy(self, length: int, room: int = 0) -> "Branch":
        """Another continuation that begins with the first tokens of this one."""
        other = Branch(self.base, self.ids[:length], room=room)
        capacity = max(room, length)
        other.tails = [
            Tail(
                _grow(tail.keys[:, :, :length], tail.keys, length, capacity),
                _grow(tail.values[:, :, :length], tail.values, length, capacity),
            )
            for tail in self.tails
        ]
        return other


class Stem(Base):
    """What a continuation holds by now, for further ones to go on from; it may go on itself.

    Nothing is copied: it writes behind these entries, which stay as they are.
    """

    def __init__(self, branch: Branch):
        self.below, self.position = branch.base, branch.position
        branch.shared = len(branch.ids)
        seen = slice(len(branch.ids))
        self._layers = [
            [(_apart(tail, tail.keys[:, :, seen]), _apart(tail, tail.values[:, :, seen]), None)]
            for tail in branch.tails
        ]


def _apart(tail: Tail, held: Tensor) -> Tensor:
    """Entries that do not keep those of others, beside whom they are stacked, from being freed."""
    return held if tail.place is None else held.clone()


def _grow(held: Tensor, like: Tensor, length: int, capacity: int) -> Tensor:
    buffer = like.new_empty(1, like.shape[1], capacity, like.shape[3])
    buffer[:, :, :length] = held[:, :, :length]
    return buffer
