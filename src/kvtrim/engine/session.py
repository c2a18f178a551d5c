"""One generation's state: what was read, what each layer holds, what is due.

Whoever runs the model feeds a session: `begin`, then `attend` for each layer, then `end`. A
    session
knows nothing of transformers, and nothing of it lives on the model, so conversations can
alternate.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from kvtrim.budgets import Keep
from kvtrim.cache.attend import require_known
from kvtrim.cache.store import LayerStore
from kvtrim.engine.call import Call, attended, last_queries, real_queries, stored
from kvtrim.engine.evict import Evictor, merge
from kvtrim.engine.generated import Evictors, trimmers
from kvtrim.engine.reading import Pass
from kvtrim.engine.state import Mark, State
from kvtrim.errors import CacheError
from kvtrim.methods import Method
from kvtrim.spans import Given, per_prompt
from kvtrim.types import Float, LayerView, Tensor

CARRIED = "carried"  # the store's column for a policy's running statistic


@dataclass(frozen=True)
class Plan:
    """What is due in one pass."""

    before: bool = False  # evict ahead of the new tokens
    after: bool = False  # evict once they have attended
    observe: bool = False  # the policy updates its running statistic
    again: bool = False  # what is held now will be scored by a later pass
    carry: bool = False  # and the policy's statistic will be needed then
    closes: bool = False  # what is read is not generated, where the schedule tells them apart
    lookback: int = 0  # how many of the last queries the policy reads


class Session:
    """The state of one batch of prompts through one model under one method.

    Args:
        method: what to evict and when.
        keep: the budget.
        layers: how many layers kvtrim manages.
        prompt_tokens: columns of the prompt if it comes in several passes; by default the first
            pass is the whole prompt.
        impl: implementation of attention over the store.
        spans: named parts of each prompt, see `kvtrim.hf.cache.Cache`.

    Raises:
        BudgetError: a number of tokens too small for what the method always keeps.
        UnknownNameError: no such `impl`.
    """

    def __init__(
        self,
        method: Method,
        keep: Keep,
        layers: int,
        prompt_tokens: int | None = None,
        impl: str = "auto",
        spans: Given | Sequence[Given] | None = None,
    ):
        require_known(impl)
        self.method, self.keep, self.impl = method, keep, impl
        self.prompt_tokens, self.spans = prompt_tokens, per_prompt(spans)
        self.tap: Callable[[int, Call], None] | None = None  # sees every call, for recording
        self.state = State.empty(layers)
        self._pass: Pass | None = None
        self._plan = Plan()
        self._evictors: Evictors = []
        if keep.kind == "tokens" and not method.budget.unlimited:
            protected = method.policy.sinks + method.policy.recent(int(keep.amount))
            keep.entries(prompt=protected + 1, protected=protected, entry_bytes=1)

    # A pass over the model

    def begin(self, rows: int, columns: int, mask: Tensor | None = None) -> None:
        """Start a pass over `columns` new columns of `rows` prompts; mask as in `Reading.plan`.

        Raises:
            CacheError: the last pass over this cache never ended.
            UsageError: the input does not continue what this cache has read.
        """
        if self._pass is not None:
            raise CacheError(
                "an earlier forward pass over this cache was interrupted, so its layers disagree; "
                "rewind it to a mark taken before, or start a new cache"
            )
        taken_back = self.state.reading.masked_again(mask, columns)
        if taken_back is not None:
            self.state.forget_from(self.state.reading.take_back(taken_back))
        now, self._plan = self.state.reading.plan(rows, columns, mask), self._planned(columns)
        self.state.name(self.spans, now, complete=self.in_prompt and self._plan.after)
        self._pass = now
        self._evictors = []

    def attend(self, index: int, call: Call) -> Float[Tensor, "B H Q E"]:
        """One layer's attention over everything held and the new tokens; then evict what is
        due.
        """
        if self.tap is not None:
            self.tap(index, call)
        with _writable():
            call, store = self._stored(index, call)
            out = attended(store, call, self._now, self.impl)
            self._settled(index, call, store)
        return out

    def absorb(self, index: int, call: Call) -> None:
        """As `attend`, without computing the attention: to go through a recorded pass again."""
        with _writable():
            call, store = self._stored(index, call)
            self._settled(index, call, store)

    def end(self) -> None:
        """All layers have attended."""
        cut = self._plan.before or self._plan.after
        self.state.reading.record(self._now)
        if self._plan.closes:
            self.state.close(self.method.schedule.share)
        fresh = cut or self._plan.closes
        self.state.since_cut = 0 if fresh else self.state.since_cut + self._now.columns
        self._pass = None

    @property
    def in_prompt(self) -> bool:
        """The pass at hand, or else the next one, reads the prompt."""
        return self.state.reading.seen < (self.prompt_tokens or 1)

    @property
    def under_way(self) -> bool:
        """A pass has begun and not ended."""
        return self._pass is not None

    def mark(self) -> Mark:
        """Remember this state, for `rewind`."""
        return self.state.mark(self.in_prompt or self.method.schedule.every is not None)

    def rewind(self, mark: Mark) -> None:
        """Return to a marked state, also after an interrupted pass."""
        self.state, self._pass = mark.restored(), None

    def reset(self) -> None:
        """Forget everything that was read."""
        self.state, self._pass = State.empty(len(self.state.layers)), None

    def copy(self) -> "Session":
        """An independent session in the same state."""
        other = copy.copy(self)
        other.state = self.state.copy()
        return other

    # Inside a pass

    @property
    def _now(self) -> Pass:
        if self._pass is None:
            raise CacheError("no forward pass is under way over this cache; call begin first")
        return self._pass

    def _planned(self, columns: int) -> "Plan":
        """What is due in a pass over so many columns."""
        schedule, policy, state = self.method.schedule, self.method.policy, self.state
        given = self.in_prompt or columns > 1 or state.reading.seen < state.expected
        closes = given and schedule.region == "generated"
        if self.in_prompt:
            cut = state.reading.seen + columns >= (self.prompt_tokens or 1)
        else:
            cut = schedule.every is not None and state.since_cut + columns >= schedule.every
            cut = cut and not closes
        more = self.in_prompt and not cut
        again = schedule.every is not None or more
        before = cut and schedule.ahead and not self.in_prompt
        return Plan(
            before=before,
            after=cut and not before,
            observe=policy.observes(not self.in_prompt) and (cut or again),
            again=again,
            carry=again and policy.observes(not more),
            closes=closes,
            lookback=policy.lookback(),
        )

    def _stored(self, index: int, call: Call) -> tuple[Call, LayerStore]:
        """Take in a layer's new entries, making room first where that is due."""
        now, held = self._now, self.state.layers[index]
        held.full_entry = call.keys.shape[1] * call.kv_bytes
        if self.method.granularity == "query":
            call = call.per_query_head()
        if self._plan.before and held.store is not None:
            self._cut(index, call, held.store, call.queries[:, :, :0], coming=now.columns)
        held.store = stored(held.store, call, now)
        return call, held.store

    def _settled(self, index: int, call: Call, store: LayerStore) -> None:
        """After a layer's new tokens have attended: observe, evict, keep what is needed later."""
        plan, held = self._plan, self.state.layers[index]
        if plan.observe:
            self._observe(index, call, store)
        if plan.after or plan.again:
            last = last_queries(held.queries, call.queries, self._now, plan.lookback)
            if plan.after:
                self._cut(index, call, store, last)
            held.queries = last.clone() if plan.lookback and plan.again else None
        store.settle()
        if plan.observe and not plan.carry:
            store.drop_column(CARRIED)

    def _observe(self, index: int, call: Call, store: LayerStore) -> None:
        """Let the policy update its running statistic with this pass's queries."""
        store.add_column(CARRIED)
        for rows in self._now.groups():
            part = self._part(store, rows)
            queries = real_queries(call.queries, self._now, rows)
            view = self._view(index, call, part, queries, rows, keep=0)
            part.set_column(CARRIED, self.method.policy.observe(view))

    def _cut(
        self, index: int, call: Call, store: LayerStore, last: Tensor, coming: int = 0
    ) -> None:
        """Evict from one layer what exceeds its budget, leaving room for `coming` tokens."""
        if not self._evictors:
            self._evictors = self._new_evictors(call, coming)
        parts = []
        for rows, evictor in self._evictors:
            part = self._part(store, rows)
            view = self._view(index, call, part, last[rows], rows, evictor.keep)
            parts.append((rows, evictor.choose(view)))
        kept = merge(parts, store.length)
        if kept is not None:
            store.retain(kept)
            self.state.cut_at = self.state.reading.seen + (0 if coming else self._now.columns)

    def _new_evictors(self, call: Call, coming: int) -> Evictors:
        if not self.in_prompt and self.method.schedule.region == "generated":
            return trimmers(self.method, self.state, self._now)
        if self.in_prompt:
            entry = len(self.state.layers) * call.keys.shape[1] * call.entry_bytes * self._now.rows
            self.state.keeps = [self._budget(length, entry) for length in self._now.lengths()]
        evictors = []
        for rows in self._now.groups():
            keep, asked = self.state.keeps[rows.start]
            evictors.append((rows, Evictor(self.method, max(1, keep - coming), asked)))
        return evictors

    def _budget(self, length: int, entry_bytes: int) -> tuple[int, float]:
        """Entries per head for a prompt of this length, and the same before rounding."""
        asked, policy = self.keep.asked(length, entry_bytes), self.method.policy
        protected = policy.sinks + policy.recent(int(asked))
        return self.keep.entries(length, protected, entry_bytes), asked

    def _part(self, store: LayerStore, rows: slice) -> LayerStore:
        everyone = rows.stop - rows.start == self._now.rows
        return store if everyone else store.row(rows.start)

    def _view(
        self, index: int, call: Call, store: LayerStore, queries: Tensor, rows: slice, keep: int
    ) -> LayerView:
        dense, lengths = store.dense()
        return LayerView(
            index=index,
            layers=len(self.state.layers),
            keep=keep,
            tokens=self._now.lengths()[rows.start],
            queries=queries,
            keys=dense["keys"],
            values=dense["values"],
            positions=dense["positions"],
            scale=call.scale,
            softcap=call.softcap,
            lengths=lengths,
            carried=dense.get(CARRIED),
            decoding=not self.in_prompt,
            output=call.output,
            spans=tuple(self.state.spans[rows]),
        )


@contextmanager
def _writable() -> Iterator[None]:
    """What is stored must stay writable when the caller leaves inference mode, and needs no
    graph.
    """
    if torch.is_inference_mode_enabled() or torch.is_grad_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield
