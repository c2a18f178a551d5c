"""Passes that can be taken back: what one of them found, and what it was handed.

Where entries are only appended, going back is forgetting the newest ones. Other passes change
what is remembered beside them: statistics, last queries, when a cut was due. Going back is then to
return to what the pass found, and to go through the part of it that stays again.
"""

from dataclasses import dataclass, field, replace

from kvtrim.engine.cuts import CARRIED
from kvtrim.engine.layer import Call
from kvtrim.engine.state import Mark, State
from kvtrim.types import Tensor

RECALLED = 64
"""Columns of the longest pass of which a part can be taken back without announcing it."""

PASSES = 32
"""How many passes can be taken back."""


@dataclass
class Past:
    """One pass."""

    mark: Mark  # of the state that it found
    carried: list[Tensor | None]  # the policy's statistic of every layer, where stores are shared
    columns: int
    mask: Tensor | None
    keeps_calls: bool  # else it goes as a whole
    calls: dict[int, Call] = field(default_factory=dict)

    @property
    def seen(self) -> int:
        """Columns read before it."""
        return self.mark.state.reading.seen

    @property
    def nbytes(self) -> int:
        """Bytes that are held for it."""
        tensors = [each for each in self.carried if each is not None]
        for call in self.calls.values():
            tensors += [call.queries, call.keys, call.values]
            tensors += [] if call.hidden is None else [call.hidden]
        held = 0 if self.mark.reaches is not None else self.mark.state.held_bytes
        return held + sum(tensor.nbytes for tensor in tensors)

    @classmethod
    def begun(
        cls, state: State, columns: int, mask: Tensor | None, evicts: bool, keeps_calls: bool
    ) -> "Past":
        """A pass is about to begin, which may evict entries of this state."""
        carried = [
            store.column(CARRIED).clone() if store is not None and store.has(CARRIED) else None
            for store in (held.store for held in state.layers)
        ]
        found = state.mark(evicts)
        return cls(found, [] if evicts else carried, columns, mask, keeps_calls)

    def note(self, index: int, call: Call, hidden: bool) -> None:
        """Remember what a layer was handed."""
        if self.keeps_calls:
            self.calls[index] = call if hidden else replace(call, hidden=None)

    def restored(self) -> State:
        """The state that it found."""
        state = self.mark.restored()
        for held, carried in zip(state.layers, self.carried, strict=False):
            if held.store is None:
                continue
            if carried is None:
                held.store.drop_column(CARRIED)
            else:
                held.store.add_column(CARRIED)
                held.store.set_column(CARRIED, carried)
        return state

    def part(self, columns: int) -> tuple[Tensor | None, dict[int, Call]]:
        """The mask and the calls of its first columns."""
        mask, calls = self.mask, {}
        if mask is not None:
            before = mask.shape[1] - self.columns
            mask = mask[:, : before + columns]
        for index, call in self.calls.items():
            own = (each[:, :, :columns] for each in (call.queries, call.keys, call.values))
            queries, keys, values = own
            hidden = None if call.hidden is None else call.hidden[:, :columns]
            calls[index] = replace(call, queries=queries, keys=keys, values=values, hidden=hidden)
        return mask, calls
