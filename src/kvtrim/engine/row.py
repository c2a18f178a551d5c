"""Tokens of several continuations as one row of a pass: who stands where, and their attention.

What every layer needs to know of that is worked out once. Short continuations that get one token
each, as answers do, have their entries stacked in one tensor per layer and stay there from pass to
pass: all new entries are written at once, and one product goes through all of them. A call of
attention for each would take longer than reading all weights of a small model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from kvtrim.engine.branch import Base, Branch, Stack, Tail
from kvtrim.engine.layer import Call
from kvtrim.kernels.parts import Part, attend_part, join_parts
from kvtrim.types import Bool, Float, Int, Tensor

_SHORT = 512  # entries of a continuation that is stacked
_STEP = 64  # entries that rows of a stack grow by


Near = tuple[Base, slice | Tensor, Int[Tensor, " N"]]
"""A prompt, columns that see some of its last entries in layers that slide, and how many each."""


class Row:
    """The new tokens of several continuations in one pass.

    Args:
        branches: each with how many tokens it gets. They may stand in another order in the row.
        seats: where it is said what a pass is about, if pass after pass they get one token each.
            All are stacked then, with all the room that they were promised.
    """

    def __init__(self, branches: Sequence[tuple[Branch, int]], seats: "SeatState | None" = None):
        counts = {id(branch): count for branch, count in branches}
        given = _neighbours([branch for branch, _ in branches])
        if seats is not None:
            groups = _groups(given, _room)
        else:
            single = [each for each in given if counts[id(each)] == 1 and _is_short(each)]
            groups = [group for group in _groups(single, _capacity) if len(group) > 1]
        stacked = [each for group in groups for each in group]
        apart = [each for each in given if not any(each is other for other in stacked)]
        self.columns: dict[int, slice] = {}  # by the identity of a branch
        self.end = 0  # how many tokens there are
        for branch in apart:
            branch.unstack()
        for branch in [*stacked, *apart]:
            first, self.end = self.end, self.end + counts[id(branch)]
            self.columns[id(branch)] = slice(first, self.end)
        self._apart, self._seats = apart, seats
        starts = [self.columns[id(group[0])].start for group in groups]
        self._groups = [_Group.of(*each, seats) for each in zip(groups, starts, strict=True)]
        self._bases = self._columns_of_bases(given)
        self._at = torch.empty(self.end, dtype=torch.long)  # where every token stands
        for branch in given:
            own = self.columns[id(branch)]
            first = branch.position
            self._at[own] = torch.arange(first, first + own.stop - own.start)
        self._near: dict[int, list[list[Near]]] = {}

    def is_seated(self, branch: Branch) -> bool:
        """Whether all that a branch holds is still where this row has it."""
        return any(group.holds(branch) for group in self._groups)

    def hide(self) -> None:
        """Hide what stands behind each seat's entries, before a pass over seats."""
        for group in self._groups:
            group.hide()

    def _columns_of_bases(
        self, branches: Sequence[Branch]
    ) -> list[list[tuple[Base, slice | Tensor]]]:
        """The prompts that are continued, with the columns of all who continue each.

        First those that continue nothing themselves, then what continues these, and so on.
        """
        levels: list[dict[int, tuple[Base, list[int]]]] = []
        for branch in branches:
            own = self.columns[id(branch)]
            for level, base in enumerate(branch.bases):
                if level == len(levels):
                    levels.append({})
                _, columns = levels[level].setdefault(id(base), (base, []))
                columns += range(own.start, own.stop)
        return [
            [(base, self._columns(sorted(columns))) for base, columns in found.values()]
            for found in levels
        ]

    def _columns_near(self, window: int) -> list[list[Near]]:
        """The prompts whose ends are within some token's window, as `_columns_of_bases`."""
        if window not in self._near:
            self._near[window] = levels = []
            for bases in self._bases:
                levels.append([])
                for base, columns in bases:
                    held = window - 1 - (self._at[columns] - base.position)
                    chosen = torch.arange(self.end)[columns][held > 0]
                    if len(chosen):
                        own = self._columns(chosen.tolist())
                        levels[-1].append((base, own, held[held > 0]))
        return self._near[window]

    def _columns(self, columns: list[int]) -> slice | Tensor:
        """Ascending columns as a slice, if they follow each other."""
        if columns[-1] - columns[0] == len(columns) - 1:
            return slice(columns[0], columns[-1] + 1)
        return torch.tensor(columns, device=None if self._seats is None else self._seats.device)

    def attend(
        self, index: int, call: Call, window: int | None = None
    ) -> Float[Tensor, "1 H Q E"]:
        """All tokens' attention in one layer, over their prompts and what continues those.

        Args:
            window: the layer slides: a token sees so many at most, itself included.
        """
        parts = [group.attend(index, call, window) for group in self._groups]
        for branch in self._apart:
            own = self.columns[id(branch)]
            held = branch.append(index, call.keys[:, :, own], call.values[:, :, own])
            given = call.queries[:, :, own], *held, call.scale, call.softcap
            parts.append(attend_part(*given, causal=True, window=window))
        out, lse = parts[0]
        if len(parts) > 1:
            out, lse = (torch.cat(side, dim=2) for side in zip(*parts, strict=True))
        if self._bases:
            levels = self._bases if window is None else self._columns_near(window)
            found = [self._attend_to(bases, index, call, out, lse) for bases in levels]
            out = join_parts([(out, lse), *found])
        return out.to(call.queries.dtype)

    def _attend_to(
        self,
        bases: Sequence[tuple[Base, slice | Tensor] | Near],
        index: int,
        call: Call,
        out: Float[Tensor, "1 H Q E"],
        lse: Float[Tensor, "1 H Q"],
    ) -> Part:
        """What all tokens find in the prompts that they continue; nothing for those of none."""
        found = torch.zeros_like(out, dtype=lse.dtype), torch.full_like(lse, -torch.inf)
        for base, columns, *counts in bases:
            queries = call.queries[:, :, columns]
            if counts:
                part = base.attend_window(index, call, queries, *counts)
            else:
                part = base.attend(index, call, queries)
            if part is not None:
                for side, own in zip(found, part, strict=True):
                    side[:, :, columns] = own.to(side.dtype)
        return found


@dataclass(frozen=True)
class SeatState:
    """What a pass over seats is about, in buffers that stay where they are."""

    lengths: Int[Tensor, " N"]  # entries of each, before the pass
    taken: Bool[Tensor, " N"]  # False: who sat there has left, and nothing is written

    @classmethod
    def of(cls, count: int, device: torch.device) -> "SeatState":
        """So many, all taken, by branches without entries."""
        lengths = torch.zeros(count, dtype=torch.long, device=device)
        return cls(lengths, torch.ones(count, dtype=torch.bool, device=device))

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self.lengths.device

    def part(self, columns: slice) -> "SeatState":
        """Some of them."""
        return SeatState(self.lengths[columns], self.taken[columns])


@dataclass(frozen=True)
class _Group:
    """Continuations that are stacked, each of which gets one token."""

    branches: list[Branch]
    columns: slice
    capacity: int  # entries of a row
    rows: Int[Tensor, " N"]
    lengths: Int[Tensor, " N"]  # entries before this pass
    most: int  # entries of the longest, the new one included
    bias: Float[Tensor, "N 1 S"] | None  # -inf behind a row's entries; None: all are equally long
    seats: SeatState | None = None
    stacks: tuple[Stack, ...] = ()  # of every layer, where they stay

    @classmethod
    def of(cls, branches: list[Branch], first: int, seats: SeatState | None) -> "_Group":
        """A group that stands in the row of tokens from a column on."""
        device, count = branches[0].tails[0].keys.device, len(branches)
        columns = slice(first, first + count)
        if seats is not None:
            most = max(map(_room, branches))
            bias = torch.zeros(count, 1, most, device=device)
            rows, own = torch.arange(count, device=device), seats.part(columns)
            group = cls(branches, columns, most, rows, own.lengths, most, bias, own)
            stacks = [group._stack(index) for index in range(len(branches[0].tails))]
            return replace(group, stacks=tuple(stacks))
        lengths = torch.tensor([len(branch.ids) for branch in branches])
        most, bias = int(lengths.max()) + 1, None
        if int(lengths.min()) + 1 < most:
            beyond = torch.arange(most) > lengths[:, None]
            bias = torch.zeros(beyond.shape).masked_fill_(beyond, -torch.inf)[:, None].to(device)
        capacity = max(_capacity(each) for each in branches)
        given = torch.arange(count, device=device), lengths.to(device), most, bias
        return cls(branches, columns, capacity, *given)

    def hide(self) -> None:
        """Make the bias of a pass over seats, in its place."""
        if self.bias is not None:
            beyond = torch.arange(self.most, device=self.bias.device) > self.lengths[:, None]
            self.bias.zero_().masked_fill_(beyond[:, None], -torch.inf)

    def holds(self, branch: Branch) -> bool:
        """Whether a branch is of this group, and its entries are where they were stacked."""
        row = next((n for n, each in enumerate(self.branches) if each is branch), None)
        ends = (0, -1)  # a pass moves all layers' entries
        return row is not None and all(
            branch.tails[end].place == (self.stacks[end], row) for end in ends
        )

    def _bias(self, window: int | None) -> Float[Tensor, "N 1 S"] | None:
        """`bias`, and -inf before each row's window."""
        if window is None or self.most <= window:
            return self.bias
        before = torch.arange(self.most, device=self.lengths.device) <= (
            self.lengths[:, None] - window
        )
        hidden = torch.zeros(before.shape, device=before.device).masked_fill_(before, -torch.inf)
        return hidden[:, None] if self.bias is None else self.bias + hidden[:, None]

    def attend(self, index: int, call: Call, window: int | None = None) -> Part:
        """What the new tokens find in what each continuation holds, itself included."""
        stack = self.stacks[index] if self.stacks else self._stack(index)
        rows, lengths = (each.to(stack.keys.device) for each in (self.rows, self.lengths))
        for held, came in ((stack.keys, call.keys), (stack.values, call.values)):
            new = came[0, :, self.columns].transpose(0, 1)
            if self.seats is not None:
                new = torch.where(self.seats.taken[:, None, None], new, held[rows, :, lengths])
            held[rows, :, lengths] = new
        bias, seen = self._bias(window), slice(self.most)
        if bias is not None:
            bias = bias.to(stack.keys.device).expand(-1, stack.keys.shape[1], -1)
        queries = call.queries[:, :, self.columns].transpose(0, 2)
        held = stack.keys[:, :, seen], stack.values[:, :, seen]
        out, lse = attend_part(queries, *held, call.scale, call.softcap, bias)
        return out.transpose(0, 2), lse.transpose(0, 2)

    def _stack(self, index: int) -> Stack:
        """One layer's stack, made anew if it is not of just these or has no room."""
        tails = [branch.tails[index] for branch in self.branches]
        places = [tail.place for tail in tails]
        stack = places[0][0] if places[0] is not None else None
        if (
            stack is not None
            and stack.keys.shape[2] >= self.most
            and stack.keys.shape[0] == len(tails)
            and all(place == (stack, row) for row, place in enumerate(places))
        ):
            return stack
        like, size = tails[0], (len(tails), tails[0].keys.shape[1], self.capacity)
        stack = Stack(
            like.keys.new_zeros(*size, like.keys.shape[3]),
            like.values.new_zeros(*size, like.values.shape[3]),
        )
        for row, (branch, tail) in enumerate(zip(self.branches, tails, strict=True)):
            length, part = len(branch.ids), slice(row, row + 1)
            stack.keys[part, :, :length] = tail.keys[:, :, :length]
            stack.values[part, :, :length] = tail.values[:, :, :length]
            branch.tails[index] = Tail(stack.keys[part], stack.values[part], (stack, row))
        return stack


def _is_short(branch: Branch) -> bool:
    """Whether it may be stacked: some of it was read, and that is not long."""
    return 0 < len(branch.ids) < _SHORT


def _capacity(branch: Branch) -> int:
    """Entries of a row that takes it and one more, and no more than there will be."""
    steps = (len(branch.ids) // _STEP + 1) * _STEP
    return min(steps, branch.room) if branch.room > len(branch.ids) else steps


def _room(branch: Branch) -> int:
    """Entries of a row that takes all that it will come to hold."""
    return max(branch.room, len(branch.ids) + 1)


def _groups(branches: Sequence[Branch], rows: Callable[[Branch], int]) -> list[list[Branch]]:
    """Those that go into one stack, which takes no more room than they were promised.

    Args:
        rows: entries that a branch's row is made for.
    """
    groups: list[list[int]] = []
    room = 0  # what those of the last group were promised
    capacity = [rows(branch) for branch in branches]
    for number in sorted(range(len(branches)), key=lambda number: -capacity[number]):
        own = max(branches[number].room, capacity[number])
        if groups and (len(groups[-1]) + 1) * capacity[groups[-1][0]] <= room + own:
            groups[-1].append(number)
            room += own
        else:
            groups.append([number])
            room = own
    return [[branches[number] for number in sorted(group)] for group in groups]


def _neighbours(branches: Sequence[Branch]) -> list[Branch]:
    """The same, those of one prompt next to each other."""
    places: dict[int, int] = {}
    chains = {id(branch): [id(base) for base in branch.bases] for branch in branches}
    for chain in chains.values():
        for base in chain:
            places.setdefault(base, len(places))
    return sorted(branches, key=lambda branch: [places[base] for base in chains[id(branch)]])
