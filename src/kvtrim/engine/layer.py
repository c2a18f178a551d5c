"""One layer in one pass: what the model hands over, what is held, and how the two are joined."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch

from kvtrim.cache.store import LayerStore
from kvtrim.engine.propagation import Narrowing
from kvtrim.engine.tokens import Pass
from kvtrim.kernels import sdpa
from kvtrim.kernels.attend import attend
from kvtrim.types import Counts, Float, Int, Tensor


@dataclass(frozen=True)
class Call:
    """What the model hands to one layer's attention in one pass, everything after RoPE."""

    queries: Float[Tensor, "B H Q D"]
    keys: Float[Tensor, "B K Q D"]
    values: Float[Tensor, "B K Q E"]
    scale: float
    softcap: float | None = None
    output: Callable[[], Float[Tensor, "H E M"]] | None = None  # W_O per query head
    factor: Callable[[], Float[Tensor, "H E E"]] | None = None  # R with |v @ W_O| = |v @ R.T|
    rotate: Callable[[Float[Tensor, "N D"], Int[Tensor, " N"]], Tensor] | None = None
    """Keys turned on by so many positions each, for methods with rolled positions."""
    hidden: Float[Tensor, "B Q M"] | None = None  # what the attention received, after the norm

    @property
    def kv_bytes(self) -> int:
        """What key and value of one entry of one head take."""
        return (self.keys.shape[-1] + self.values.shape[-1]) * self.keys.element_size()

    @property
    def entry_bytes(self) -> int:
        """What one entry of one head takes, its position included."""
        return self.kv_bytes + torch.int32.itemsize

    def no_output(self) -> Float[Tensor, "B H Q E"]:
        """Zeros in the shape of attention's output."""
        return self.queries.new_zeros(*self.queries.shape[:3], self.values.shape[-1])

    def remembered_bytes(self, count: int, hidden: bool) -> int:
        """What the last `count` queries of every prompt take, and what goes with them."""
        sizes = [self.queries[:, :, :1].nbytes]
        if hidden and self.hidden is not None:
            sizes.append(self.hidden[:, :1].nbytes)
        return count * sum(sizes)

    def row(self, number: int) -> "Call":
        """One prompt's part of it."""
        part = slice(number, number + 1)
        queries, keys, values = self.queries[part], self.keys[part], self.values[part]
        hidden = None if self.hidden is None else self.hidden[part]
        return replace(self, queries=queries, keys=keys, values=values, hidden=hidden)

    def columns(self, part: slice) -> "Call":
        """Some of its tokens."""
        queries, keys, values = (x[:, :, part] for x in (self.queries, self.keys, self.values))
        hidden = None if self.hidden is None else self.hidden[:, part]
        return replace(self, queries=queries, keys=keys, values=values, hidden=hidden)

    def without_tokens(self) -> "Call":
        """The same layer, and nothing new to it."""
        queries, keys, values = (x[:, :, :0] for x in (self.queries, self.keys, self.values))
        hidden = None if self.hidden is None else self.hidden[:, :0]
        return replace(self, queries=queries, keys=keys, values=values, hidden=hidden)

    def per_query_head(self) -> "Call":
        """The same call with K and V repeated, so that every query head has its own entries."""
        times = self.queries.shape[1] // self.keys.shape[1]
        keys = self.keys.repeat_interleave(times, dim=1)
        return replace(self, keys=keys, values=self.values.repeat_interleave(times, dim=1))


@runtime_checkable
class Attends(Protocol):
    """What stands behind the attention of a model's managed layers during one pass."""

    def attend(self, index: int, call: Call) -> Float[Tensor, "B H Q E"]:
        """One layer's attention over everything that is held for it, and its new tokens."""
        ...


@dataclass
class Held:
    """What one layer holds between passes."""

    store: LayerStore | None = None
    queries: Float[Tensor, "B H W D"] | None = None  # each prompt's last queries, newest last
    hidden: Float[Tensor, "B W M"] | None = None  # and what the attention received for them
    references: tuple[Float[Tensor, "H r D"], ...] | None = None  # of each prompt, for a refit
    full_entry: int = 0  # bytes of K and V that one token adds to this layer of a full cache
    share: Counts | None = None  # [B, K] entries won from a model-wide budget, for later cuts

    @property
    def heads(self) -> int:
        """Heads that store entries here; 0 before the first pass."""
        return 0 if self.store is None else self.store.length.shape[1]

    @property
    def kv_heads(self) -> int:
        """KV heads that the model has here; 0 before the first pass."""
        if self.store is None:
            return 0
        keys, values = self.store.keys, self.store.values
        return self.full_entry // ((keys.shape[-1] + values.shape[-1]) * keys.element_size())

    def share_of(self, rows: slice) -> Counts | None:
        """What a group of prompts won from a model-wide budget, if that is settled."""
        settled = self.share is not None and bool((self.share[rows] >= 0).all())
        return self.share[rows] if self.share is not None and settled else None

    def settle_share(self, rows: slice, prompts: int, won: Sequence[Counts], layer: int) -> None:
        """Remember what a group of prompts won in this layer, for later cuts."""
        if won and self.share_of(rows) is None:
            unsettled = torch.full((prompts, won[layer].shape[1]), -1)
            share = unsettled if self.share is None else self.share.clone()
            share[rows] = won[layer]
            self.share = share

    def remember(self, queries: Tensor, hidden: Tensor | None, count: int) -> None:
        """Keep copies of the last `count` queries and what goes with them; of none, nothing."""
        self.queries = queries.clone() if count else None
        self.hidden = hidden.clone() if count and hidden is not None else None

    def forget(self, count: int) -> None:
        """Keep the last `count` of the remembered queries alone."""
        if self.queries is not None and self.queries.shape[2] > count:
            hidden = None if self.hidden is None else self.hidden[:, -count:]
            self.remember(self.queries[:, :, -count:], hidden, count)

    @property
    def settled(self) -> bool:
        """All prompts' entries here are won from a model-wide budget."""
        return self.share is not None and bool((self.share >= 0).all())

    def copy(self) -> "Held":
        """An independent copy; tensors that are only ever replaced are shared."""
        return replace(self, store=None if self.store is None else self.store.copy())

    @property
    def nbytes(self) -> int:
        """Bytes of entries, slack, per-entry columns and remembered queries."""
        parts = (self.queries, self.hidden, self.store, *(self.references or ()))
        return sum(part.nbytes for part in parts if part is not None)


def append_tokens(
    store: LayerStore | None, call: Call, now: Pass, columns: Mapping[str, Tensor] | None = None
) -> LayerStore:
    """The store with this pass's real tokens added; a whole prompt is borrowed, not copied.

    Args:
        columns: numbers [B, K, Q] that go with the new entries, by name.
    """
    own = columns or {}
    keys, values, device = call.keys, call.values, call.keys.device
    if now.real is None:
        new = {"keys": keys, "values": values, "positions": now.positions(device), **own}
        if store is None:
            return LayerStore.borrow(new)
        store.append(new)
        return store
    store = store or LayerStore.empty(keys, values)
    for name in own:
        store.add_column(name)
    for row, real in enumerate(now.real):
        positions = now.row_positions(row, device)
        part, given = slice(row, row + 1), {"keys": keys, "values": values, **own}
        new = {name: tensor[part, :, real] for name, tensor in given.items()}
        store.append_row(row, {**new, "positions": positions})
    return store


def attend_tokens(
    store: LayerStore, call: Call, now: Pass, impl: str, narrowing: Narrowing | None = None
) -> Float[Tensor, "B H Q E"]:
    """Attention of this pass's real tokens over everything held; padding gets zeros.

    So do, where a part of the prompt goes on, the tokens that do not; the reference asks for all.
    """
    if narrowing is not None and impl != "reference":
        return _attend_in_part(store, call, narrowing)
    if now.real is None:
        return attend(call.queries, store, call.scale, call.softcap, impl)
    out = call.no_output()
    for row, columns in enumerate(now.real):
        if len(columns):
            own = call.queries[row : row + 1, :, columns]
            mixed = attend(own, store.row(row), call.scale, call.softcap, impl)
            out[row : row + 1, :, columns] = mixed
    return out


def _attend_in_part(
    store: LayerStore, call: Call, narrowing: Narrowing
) -> Float[Tensor, "B H Q E"]:
    """The tokens that go on, at a layer from which nothing was evicted yet."""
    held, _ = store.dense()
    out = call.no_output()
    for row, slots in enumerate(narrowing.slots):
        real, columns = narrowing.now.real, narrowing.step[row]
        columns = (columns if real is None else columns[real[row]]).to(call.queries.device)
        own, part = call.queries[row : row + 1, :, columns], slice(row, row + 1)
        keys, values = held["keys"][part], held["values"][part]
        out[part, :, columns] = sdpa.up_to(own, keys, values, slots, call.scale, call.softcap)
    return out


def last_queries(
    before: Tensor | None, queries: Float[Tensor, "B H Q D"], now: Pass, count: int
) -> Float[Tensor, "B H W D"]:
    """Each prompt's last `count` real queries, this pass's included; zeros where it had fewer."""
    if count == 0:
        return queries[:, :, :0]
    if now.real is None:
        joined = queries if before is None else torch.cat([before, queries], dim=2)
        return joined[:, :, -count:]
    rows = [queries[row, :, columns] for row, columns in enumerate(now.real)]
    if before is not None:
        rows = [torch.cat([before[row], own], dim=1) for row, own in enumerate(rows)]
    count = min(count, max(own.shape[1] for own in rows))
    out = queries.new_zeros(*queries.shape[:2], count, queries.shape[-1])
    for row, own in enumerate(rows):
        out[row, :, max(0, count - own.shape[1]) :] = own[:, -count:]
    return out


def last_hidden(
    before: Tensor | None, hidden: Float[Tensor, "B Q M"] | None, now: Pass, count: int
) -> Float[Tensor, "B W M"] | None:
    """As `last_queries`, of what the attention received, where that was handed over."""
    if hidden is None:
        return None
    before = None if before is None else before[:, None]
    return last_queries(before, hidden[:, None], now, count)[:, 0]


def real_queries(queries: Float[Tensor, "B H Q D"], now: Pass, rows: slice) -> Tensor:
    """This pass's queries of a group of prompts, without padding: [B, H, Q, D]."""
    if now.real is None:
        return queries[rows]
    return queries[rows][:, :, now.real[rows.start]]


@contextmanager
def writable() -> Iterator[None]:
    """What is stored must stay writable outside inference mode, and needs no graph."""
    if torch.is_inference_mode_enabled() or torch.is_grad_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield
