"""One layer's entries: flat K and V, one run of slots per (prompt, KV head).

Head (b, h) owns `length[b, h]` slots from `start[b, h]`, in ascending position, with room for
`capacity[b, h]`; the three live on the CPU. Uniform lengths are the special case that the fast
paths see as [B, K, S, D] without a copy. A store knows nothing of scores, models or schedules.
"""

from weakref import WeakSet

import torch

from kvtrim.kernels.attend import BIAS
from kvtrim.types import Counts, Float, Int, Kept, Tensor

# Runs of slots, one per (prompt, KV head): where they start, their slots, their slack.

LEAST_SLACK, MOST_SLACK = 16, 256
"""A full head grows by a sixteenth of its length within these bounds: few copies, little waste."""


def next_slots(ends: Int[Tensor, " R"], count: int) -> Int[Tensor, " N"]:
    """The next `count` slots of every run."""
    if count == 1:
        return ends
    return (ends[:, None] + torch.arange(count, device=ends.device)).flatten()


def slack(length: Counts) -> Counts:
    """Free slots behind runs of these lengths."""
    return (length // 16).clamp(LEAST_SLACK, MOST_SLACK)


def common(counts: Counts) -> int | None:
    """The one number that all counts share, if they do."""
    first = int(counts.flatten()[0])
    return first if bool((counts == first).all()) else None


def starts_of(capacity: Int[Tensor, "*heads"]) -> Int[Tensor, "*heads"]:
    """First slot of each head when runs of this capacity follow each other."""
    flat = capacity.flatten()
    return (flat.cumsum(0) - flat).view_as(capacity)


def slots_of(start: Counts, length: Counts) -> Int[Tensor, " N"]:
    """The slots of every run, one after the other."""
    flat = length.flatten()
    offset = torch.repeat_interleave(start.flatten() - starts_of(flat), flat)
    return offset + torch.arange(int(flat.sum()))


class Reach:
    """How far somebody who means to come back needs the entries of a store."""

    def __init__(self, length: Counts):
        self.length = length


class LayerStore:
    """K, V and original position of every entry that one layer holds."""

    def __init__(
        self, buffers: dict[str, Tensor], start: Counts, length: Counts, capacity: Counts
    ):
        self.buffers = buffers  # "keys" [T, D], "values" [T, E], "positions" [T], and columns [T]
        self.start, self.length, self.capacity = start, length, capacity
        self.borrowed: dict[str, Tensor] | None = None
        self.width: int | None = None  # entries per head, where all heads hold the same number
        self._views: dict[str, Tensor] = {}  # then every buffer as [B, K, capacity, ...]
        self._ends = torch.empty(0, dtype=torch.int64)  # else the slot after each run
        self._free = 0  # slots that every head has left
        self._reaches: WeakSet[Reach] = WeakSet()
        self._resize(length)

    @classmethod
    def empty(
        cls, keys: Float[Tensor, "B K Q D"], values: Float[Tensor, "B K Q E"]
    ) -> "LayerStore":
        """A store without entries for prompts and heads shaped like these."""
        none = torch.zeros(keys.shape[:2], dtype=torch.int64)
        buffers = {
            "keys": keys.new_empty(0, keys.shape[-1]),
            "values": values.new_empty(0, values.shape[-1]),
            "positions": torch.empty(0, dtype=torch.int32, device=keys.device),
        }
        return cls(buffers, none, none.clone(), none.clone())

    @classmethod
    def pack(cls, buffers: dict[str, Tensor], length: Counts) -> "LayerStore":
        """A store over buffers that hold the heads' entries one after the other, without slack."""
        return cls(buffers, starts_of(length), length, length.clone())

    @classmethod
    def borrow(cls, dense: dict[str, Float[Tensor, "B K S *rest"]]) -> "LayerStore":
        """A store of a whole prompt in the model's own tensors, so that it is never held twice.

        It can be read and cut; `settle` copies what is left before anything else.
        """
        keys = dense["keys"]
        store = cls.empty(keys, dense["values"])
        store.borrowed = {
            name: tensor.expand(*keys.shape[:3], *tensor.shape[3:])
            for name, tensor in dense.items()
        }
        store.length = torch.full(keys.shape[:2], keys.shape[2])
        store.width = keys.shape[2]
        return store

    @property
    def keys(self) -> Float[Tensor, "T D"]:
        """K of every slot."""
        return self.buffers["keys"]

    @property
    def values(self) -> Float[Tensor, "T E"]:
        """V of every slot."""
        return self.buffers["values"]

    @property
    def nbytes(self) -> int:
        """Bytes of all slot buffers, slack for appends included."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def dense(self) -> tuple[dict[str, Tensor], Counts | None]:
        """Every buffer as [B, K, S, ...], and the lengths where heads differ (garbage behind).

        A view where lengths are uniform, else a padded copy.
        """
        if self.borrowed is not None:
            return self.borrowed, None
        if self.width is not None:
            return {name: view[:, :, : self.width] for name, view in self._views.items()}, None
        slots = self._padded_slots()
        return {name: buffer[slots] for name, buffer in self.buffers.items()}, self.length

    def column(self, name: str) -> Float[Tensor, "B K S"]:
        """One column of `dense`, the others left alone."""
        if self.borrowed is not None or self.width is not None:
            return self.dense()[0][name]
        return self.buffers[name][self._padded_slots()]

    def _padded_slots(self) -> Int[Tensor, "B K S"]:
        """Every head's slots; its last one again where others have more."""
        reach = torch.arange(int(self.length.max())).expand(*self.length.shape, -1)
        slots = self.start[..., None] + reach.minimum((self.length[..., None] - 1).clamp(min=0))
        return slots.clamp(max=self.keys.shape[0] - 1).to(self.keys.device)

    def keys_and_values(self) -> tuple[Float[Tensor, "B K S D"], Float[Tensor, "B K S E"]]:
        """K and V of a store of uniform lengths, without a copy."""
        if self.borrowed is not None:
            return self.borrowed["keys"], self.borrowed["values"]
        keys, values = self._views["keys"], self._views["values"]
        return keys[:, :, : self.width], values[:, :, : self.width]

    def append(self, new: dict[str, Float[Tensor, "B K Q *rest"]]) -> None:
        """Add Q entries to every head of every prompt; the columns not given become 0."""
        count = new["keys"].shape[2]
        if count > self._free:
            self._make_room(torch.full_like(self.length, count))
        if self.width is not None:
            for name, view in self._views.items():
                view[:, :, self.width : self.width + count] = new.get(name, 0)
            self.width += count
        else:
            self._write(next_slots(self._ends, count), new)
            self._ends = self._ends + count
        self._free -= count
        self.length = self.length + count

    def reserve(self, count: int) -> None:
        """Make room for so many more entries in every head: buffers stay put until they are in."""
        self.settle()
        self._make_room(torch.full_like(self.length, count))
        if BIAS in self.buffers:  # what is written behind the runs has none
            held = slots_of(self.start, self.length).to(self.keys.device)
            bias = torch.zeros_like(self.buffers[BIAS])
            bias[held] = self.buffers[BIAS][held]
            self.buffers[BIAS] = bias
            self._resize(self.length)

    def grow(self, count: int) -> None:
        """Take in entries that were written behind every head, where room was reserved."""
        self._resize(self.length + count)

    def append_row(self, row: int, new: dict[str, Float[Tensor, "1 K Q *rest"]]) -> None:
        """Add Q entries to every head of one prompt, so that prompts may differ in length."""
        count = torch.zeros_like(self.length)
        count[row] = new["keys"].shape[2]
        self._make_room(count)
        ends = (self.start + self.length)[row].to(self.keys.device)
        self._write(next_slots(ends, new["keys"].shape[2]), new)
        self._resize(self.length + count)

    def retain(self, kept: Kept) -> None:
        """Drop what is not kept.

        A few freed slots stay as slack, more go back to the allocator.
        """
        rows, heads, place = (kept.slots >= 0).nonzero(as_tuple=True)
        slots = kept.slots[rows, heads, place]
        if self.borrowed is not None:
            self.buffers = {
                name: dense[rows, heads, slots] for name, dense in self.borrowed.items()
            }
            self.borrowed = None
            self.start, self.capacity = starts_of(kept.counts), kept.counts.clone()
        else:
            old = self.start.to(slots.device)[rows, heads] + slots
            roomy = bool((self.capacity > kept.counts + 2 * slack(kept.counts)).any())
            if roomy:  # what stays moves into smaller buffers at once
                self.start, self.capacity = starts_of(kept.counts), kept.counts.clone()
            new = self.start.to(slots.device)[rows, heads] + place
            for name, buffer in self.buffers.items():
                stays = buffer.index_select(0, old)
                if not roomy:
                    buffer.index_copy_(0, new, stays)
                self.buffers[name] = stays if roomy else buffer
        self._resize(kept.counts)

    def settle(self) -> None:
        """Own the entries: copy what is still borrowed."""
        if self.borrowed is not None:
            self.buffers = {
                name: dense.new_empty(dense.shape).copy_(dense).flatten(0, 2)
                for name, dense in self.borrowed.items()
            }
            self.borrowed = None
            self.start, self.capacity = starts_of(self.length), self.length.clone()
            self._resize(self.length)

    def cut_back(self, length: Counts) -> None:
        """Forget the newest entries of each head beyond this length, and their room."""
        self._resize(torch.minimum(self.length, length))
        if bool((self.capacity > self.length + slack(self.length)).any()):
            self._move(self.length.clone())

    def reach(self) -> Reach:
        """Note how far the entries reach now, for as long as what is returned is kept."""
        reach = Reach(self.length)
        self._reaches.add(reach)
        return reach

    def shorten(self, length: Counts) -> "LayerStore":
        """This store cut back, or a copy of it where somebody needs what would be forgotten."""
        length = torch.minimum(self.length, length)
        needed = any(bool((reach.length > length).any()) for reach in list(self._reaches))
        store = self.copy() if needed else self
        store.cut_back(length)
        return store

    def forget_from(self, position: list[int]) -> None:
        """Drop every entry of prompt b that stands at `position[b]` or later."""
        self._resize(self.before(position))

    def before(self, position: list[int]) -> Counts:
        """How many entries of prompt b stand before `position[b]`, for each head."""
        dense, _ = self.dense()
        limit = torch.tensor(position, device=dense["positions"].device)[:, None, None]
        inside = torch.arange(dense["positions"].shape[-1]) < self.length[..., None]
        early = (dense["positions"] < limit) & inside.to(limit.device)
        return early.sum(dim=-1).cpu()

    def row(self, index: int) -> "LayerStore":
        """One prompt's entries, sharing memory with this store: to be read, not changed."""
        self.settle()
        part = slice(index, index + 1)
        start, capacity = self.start[part], self.capacity[part]
        first = int(start[0, 0])
        run = slice(first, int(start[0, -1] + capacity[0, -1]))
        buffers = {name: buffer[run] for name, buffer in self.buffers.items()}
        return LayerStore(buffers, start - first, self.length[part], capacity)

    def select_rows(self, rows: Int[Tensor, " R"]) -> "LayerStore":
        """A new store of these prompts, in this order; a prompt may occur more than once."""
        rows = rows.cpu()
        length, start = self.length[rows], self.start[rows]
        old = slots_of(start, length).to(self.keys.device)
        buffers = {name: buffer[old] for name, buffer in self.buffers.items()}
        return LayerStore.pack(buffers, length)

    def copy(self) -> "LayerStore":
        """An independent store with the same entries, packed."""
        return self.select_rows(torch.arange(self.length.shape[0]))

    def has(self, name: str) -> bool:
        """Whether a column was added."""
        return name in (self.buffers if self.borrowed is None else self.borrowed)

    def drop_column(self, name: str) -> None:
        """Free an added column, if there is one."""
        if self.buffers.pop(name, None) is not None:
            self._resize(self.length)

    def add_column(self, name: str) -> None:
        """Make room for one more number per entry, 0 at first, if it is not there yet."""
        if self.borrowed is not None and name not in self.borrowed:
            zeros = torch.zeros(self.borrowed["keys"].shape[:3], device=self.keys.device)
            self.borrowed = {**self.borrowed, name: zeros}
        elif self.borrowed is None and name not in self.buffers:
            self.buffers[name] = torch.zeros(self.keys.shape[0], device=self.keys.device)
            self._resize(self.length)

    def set_column(self, name: str, values: Float[Tensor, "B K S *rest"]) -> None:
        """Fill an added column, or other values, given as in `dense`."""
        if self.borrowed is not None:
            self.borrowed = {**self.borrowed, name: values}
        elif self.width is not None:
            self._views[name][:, :, : self.width] = values
        else:
            inside = torch.arange(values.shape[2]) < self.length[..., None]
            slots = slots_of(self.start, self.length).to(values.device)
            held = values[inside.to(values.device)]
            self.buffers[name][slots] = held.to(self.buffers[name].dtype)

    def _write(self, slots: Int[Tensor, " N"], new: dict[str, Tensor]) -> None:
        heads = new["keys"].shape[:3]
        for name, buffer in self.buffers.items():
            if name in new:
                given = new[name]
                if given.shape[:3] != heads:
                    given = given.expand(heads + given.shape[3:])
                buffer.index_copy_(0, slots, given.reshape(-1, *buffer.shape[1:]))
            else:
                buffer.index_fill_(0, slots, 0)

    def _resize(self, length: Counts) -> None:
        """Take new lengths, and see whether the fast path is open."""
        self.length, self.width, self._views = length, None, {}
        self._free = int((self.capacity - length).min())
        if self._is_regular() and self.borrowed is None and self.keys.shape[0]:
            self.width = common(length)
        if self.width is None:
            self._ends = (self.start + length).flatten().to(self.keys.device)
        else:
            heads = self.capacity.shape
            self._views = {name: b.unflatten(0, (*heads, -1)) for name, b in self.buffers.items()}

    def _is_regular(self) -> bool:
        return common(self.capacity) is not None and torch.equal(
            self.start, starts_of(self.capacity)
        )

    def _make_room(self, count: Counts) -> None:
        needed = self.length + count
        if bool((needed <= self.capacity).all()):
            return
        more = slack(needed) if self.keys.shape[0] else 0  # a prompt is stored without slack
        roomy = torch.maximum(self.capacity, needed + more)  # all that grow, so that few copies do
        self._move(torch.where(count > 0, roomy, self.capacity))

    def _move(self, capacity: Counts) -> None:
        """Copy the entries into new buffers with this capacity per head."""
        start, total = starts_of(capacity), int(capacity.sum())
        old = slots_of(self.start, self.length).to(self.keys.device)
        new = slots_of(start, self.length).to(self.keys.device)
        for name, buffer in self.buffers.items():
            moved = buffer.new_empty(total, *buffer.shape[1:])
            moved[new] = buffer[old]
            self.buffers[name] = moved
        self.start, self.capacity = start, capacity
        self._resize(self.length)
