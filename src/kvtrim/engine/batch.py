"""Prompts that were read and cut apart, put together to be continued in common passes.

They may come from different methods, budgets and prompts. From here on nothing is evicted, so
that only methods that evict no more once the prompt is read can take part.
"""

from collections.abc import Sequence

import torch

from kvtrim.cache.store import BIAS, LayerStore
from kvtrim.engine.layer import Held
from kvtrim.engine.session import Session
from kvtrim.engine.state import State

_OWN = ("keys", "values", "positions")


def complete(session: Session) -> bool:
    """Whether prompts without padding were read, all of one length, and are held by layers."""
    state = session.state
    return (
        state.reading.real is None
        and len(set(state.reading.lengths)) == 1
        and all(held.store is not None for held in state.layers)
    )


def joinable(session: Session) -> bool:
    """Whether what follows the prompt is only appended, at the positions where it is read."""
    method = session.method
    return complete(session) and method.schedule.every is None and method.positions == "original"


def heads(session: Session) -> tuple[int, ...]:
    """Heads per layer that hold entries of their own; sessions are joined where these agree."""
    return tuple(store.length.shape[1] for store in session.state.stores())


def join(sessions: Sequence[Session]) -> State:
    """The state of all these prompts as one batch, entries copied. All must be `joinable`."""
    states = [session.state for session in sessions]
    lengths = [length for state in states for length in state.reading.lengths]
    own = State.empty(len(states[0].layers))
    own.reading.seen, own.reading.lengths = max(lengths), lengths
    own.cut_at, own.probed, own.appended_from = own.reading.seen, True, own.reading.seen
    own.expected = max(state.expected for state in states)
    if any(state.closed_up for state in states):
        own.closed_up = [
            by for state in states for by in state.closed_up or [0] * len(state.reading.lengths)
        ]
    for number in range(len(own.layers)):
        parts = [state.layers[number] for state in states]
        stores = [held.store for held in parts if held.store is not None]
        own.layers[number] = Held(_stores(stores), full_entry=parts[0].full_entry)
    return own


def _stores(stores: Sequence[LayerStore]) -> LayerStore:
    """One store with the rows of all of these."""
    packed = [store.copy() for store in stores]
    if any(BIAS in store.buffers for store in packed):
        for store in packed:
            store.add_column(BIAS)
    names = [*_OWN, *([BIAS] if BIAS in packed[0].buffers else [])]
    buffers = {name: torch.cat([store.buffers[name] for store in packed]) for name in names}
    return LayerStore.pack(buffers, torch.cat([store.length for store in packed]))
