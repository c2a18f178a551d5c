"""One generation's state: what was read, what each layer holds, what is due.

Whoever runs the model feeds a session: `begin`, then `attend` for each layer, then `end`. A
session knows nothing of transformers, and nothing of it lives on the model, so that several
conversations can take turns on one model.
"""

import copy
from collections.abc import Callable, Sequence

from kvtrim.cache.store import LayerStore
from kvtrim.engine.cuts import Cuts, Known
from kvtrim.engine.layer import (
    Attends,
    Call,
    append_tokens,
    attend_tokens,
    last_hidden,
    last_queries,
    writable,
)
from kvtrim.engine.past import Undoable
from kvtrim.engine.plan import Plan, plan_pass, plan_probe
from kvtrim.engine.propagation import Narrowing
from kvtrim.engine.reposition import roll
from kvtrim.engine.state import CARRIED, Past, State, remark, remark_later
from kvtrim.engine.tokens import Pass
from kvtrim.errors import CacheError
from kvtrim.kernels.attend import require_known
from kvtrim.methods.demotion import require_named
from kvtrim.methods.keep import Keep
from kvtrim.methods.method import Method
from kvtrim.prompts.spans import Given, per_prompt
from kvtrim.types import Float, Probed, Tensor


class Session(Undoable):
    """The state of one batch of prompts through one model under one method.

    Args:
        method: what to evict and when.
        keep: the budget.
        layers: how many layers kvtrim manages.
        prompt_tokens: columns of the prompt if it comes in several passes; by default the first
            pass is the whole prompt.
        impl: implementation of attention over the store.
        spans: named parts of each prompt, see `kvtrim.hf.cache.Cache`.
        tap: told of every layer's number and call, to record what the model hands over.

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
        tap: Callable[[int, Call], object] | None = None,
    ):
        require_known(impl)
        method.require_room(keep)
        self.method, self.keep, self.impl = method, keep, impl
        self._prompt_tokens, self.spans = prompt_tokens, per_prompt(spans)
        self._tap = tap
        self._stand_in: Attends | None = None  # appends single tokens in its place
        self.recording = False  # drafts may be among the new tokens: `crop` says which stay
        self.state = State.empty(layers)
        self._past: Past | None = None  # the pass under way, if it does more than append
        self._plan = Plan()
        self._cutting: Cuts | None = None  # of the pass under way
        self._announced = False  # a probe's pass has begun here, the model has yet to begin it

    @property
    def seen(self) -> int:
        """Columns read."""
        return self.state.reading.seen

    @property
    def prompt_tokens(self) -> int | None:
        """Columns of the prompt if it comes in several passes: of every one, or of this one."""
        return self._prompt_tokens or self.state.prompt_tokens

    # Who attends

    @property
    def attends(self) -> Attends:
        """What stands behind the layers' attention: this session, or who stands in for it."""
        return self if self._stand_in is None else self._stand_in

    @property
    def lent(self) -> bool:
        """Somebody stands in for it."""
        return self._stand_in is not None

    def lend(self, to: Attends) -> None:
        """Let somebody else append single tokens to what is held, until `resume`."""
        self._stand_in = to

    def resume(self, taken: int) -> None:
        """Go on, after so many tokens were appended to every prompt."""
        self._stand_in, reading = None, self.state.reading
        if taken:
            reading.record(Pass(taken, list(reading.lengths), None))

    # A pass over the model

    def begin(
        self, rows: int, columns: int, mask: Tensor | None = None, known: Known | None = None
    ) -> None:
        """Start a pass over `columns` new columns of `rows` prompts; mask as in `Reading.plan`.

        Args:
            known: what an equal pass under the same policy came to; what is not there yet is
                added.

        Raises:
            CacheError: the last pass over this cache never ended.
            UsageError: the input does not continue what this cache has read.
        """
        self._require_idle()
        if self.method.demote and self.state.reading.seen == 0:
            require_named(self.spans)
        taken_back = self.state.reading.masked_again(mask, columns)
        if taken_back is not None:
            self.state.forget_from(self.state.reading.take_back(taken_back))
            self.state.past, self.state.appended_from = [], self.state.reading.seen
        now = self.state.reading.plan(rows, columns, mask)
        self._plan = plan_pass(
            self.method, self.state, self.keep, columns, now.lengths(), self.prompt_tokens
        )
        self._require_recordable(columns)
        self._past = self._remember_pass(columns, mask)
        self.state.name(self.spans, now, complete=self.in_prompt and not self._plan.coming)
        self._cutting = Cuts(
            self.method,
            self.keep,
            self.state,
            now,
            self.in_prompt,
            self._plan.coming,
            self._plan.due,
            known=known,
        )

    def begin_probe(
        self,
        columns: int,
        mask: Tensor | None,
        probed: list[Probed],
        last: bool,
        known: Known | None = None,
    ) -> None:
        """Start a pass over a probe's tokens. They are forgotten when it ends.

        Args:
            columns, mask: as in `begin`, of the new columns.
            probed: what the probe of each prompt is about.
            last: nothing more is probed, so the prompts are cut in this pass.
            known: as in `begin`.

        Raises:
            CacheError: the last pass over this cache never ended.
        """
        self._require_idle()
        now = self.state.reading.plan(len(probed), columns, mask)
        self._plan = plan_probe(self.method, self.state, self.prompt_tokens, last)
        self._cutting = Cuts(
            self.method, self.keep, self.state, now, False, probed=probed, known=known
        )
        self._announced = True

    def take_announcement(self) -> bool:
        """Whether the pass that the model begins is the one of `begin_probe`; true once."""
        announced, self._announced = self._announced and self._cutting is not None, False
        return announced

    def attend(self, index: int, call: Call) -> Float[Tensor, "B H Q E"]:
        """One layer's attention over everything held and new tokens; then evict what is due."""
        if self._tap is not None:
            self._tap(index, call)
        self._note(index, call)
        with writable():
            call, store = self._store(index, call)
            shown = self._show(call, store)
            out = self._observe(index, call, store, shown, attend=True)
            narrowing = self._choose_on(index, call, shown)
            if out is None:
                out = attend_tokens(shown, call, self._now, self.impl, narrowing)
            self._finish(index, call, store, shown)
            if narrowing is not None:
                self._cuts.narrow(narrowing)
        return out

    def absorb(self, index: int, call: Call) -> None:
        """As `attend`, without computing the attention: to go through a recorded pass again."""
        self._note(index, call)
        with writable():
            call, store = self._store(index, call)
            shown = self._show(call, store)
            self._observe(index, call, store, shown, attend=False)
            self._choose_on(index, call, shown)
            self._finish(index, call, store, shown)

    def end(self) -> None:
        """All layers have attended.

        Raises:
            CacheError: some did so elsewhere.
        """
        missing = len(self.state.layers) - len(self._cuts.attended)
        if missing:
            raise CacheError(
                f"{missing} of {len(self.state.layers)} layers did not attend through kvtrim, so "
                "this cache does not hold what was read; do not change the model's attention "
                "while kvtrim is attached, and rewind to a mark or start a new cache"
            )
        if self._plan.probe:
            self.state.probed = self._plan.after
            if self._plan.after:
                self.state.settle()
                self.state.past, self.state.appended_from = [], self.state.reading.seen
            self._cutting = None
            return
        prompt = self.in_prompt
        if not prompt:
            self.state.probed = True  # only the prompt is probed, when it is complete
        columns, expected = self._cuts.whole.columns, self.state.expected
        turn = not prompt and columns > 1 and self.state.reading.seen >= expected
        self.state.reading.record(self._cuts.whole)
        if turn and not self.recording and self.state.settled:
            pairs = zip(self.state.reading.lengths, self.state.settled, strict=True)
            self.state.added = max(length - tokens for length, (tokens, _) in pairs)
        if prompt and not self._plan.coming:
            self.state.settle()
        self.state.schedule(self._plan.due, self._plan.closes, self.method.schedule.share)
        for held in self.state.layers if not self.in_prompt else []:
            settled = held.settled or not self.method.budget.model_wide
            held.forget(max(self.method.policy.remembers(settled), self._plan.asked))
        self._note_end(self._cuts)
        self._cutting = None

    @property
    def probe_due(self) -> bool:
        """The prompt is read, the policy probes, and there is something to evict."""
        state = self.state
        if not self.method.policy.probes or self.in_prompt or state.probed or self.under_way:
            return False
        lengths, entry = state.reading.lengths, state.entry_bytes
        fits = all(self.keep.per_head(length, entry) >= length for length in lengths)
        return self.method.budget.selective or not fits

    @property
    def remark(self) -> str | None:
        """What is held of the prompt, where that is clearly not what was asked for."""
        return remark(self.method, self.keep, self.state)

    @property
    def overfed(self) -> str | None:
        """What is held beyond the budget because it came after the prompt, and what to do."""
        return None if self.recording else remark_later(self.method, self.keep, self.state)

    @property
    def probing(self) -> bool:
        """The pass under way reads a probe."""
        return self.under_way and self._plan.probe

    @property
    def under_way(self) -> bool:
        """A pass has begun and not ended."""
        return self._cutting is not None or self.lent

    def reset(self) -> None:
        """Forget everything that was read."""
        self.state = State.empty(len(self.state.layers))
        self._cutting, self._announced = None, False

    def copy(self) -> "Session":
        """An independent session in the same state."""
        other = copy.copy(self)
        other.state = self.state.copy()
        return other

    # Reading a part of the prompt

    @property
    def narrowing(self) -> Narrowing | None:
        """What the layers above read of the prompt under way; None if all of it, so far."""
        return None if self._cutting is None else self._cutting.narrowing

    @property
    def filter_layer(self) -> int | None:
        """The layer that the pass under way has to ask which part of the prompt to read."""
        propagation, layers = self.method.propagation, range(len(self.state.layers))
        if not (self._plan.propagate and propagation.restarts) or self.narrowing is not None:
            return None
        if self.keep.kind != "bytes" and all(
            self.keep.per_head(n, 1) >= n for n in self._now.lengths()
        ):
            return None
        return next((x for x in layers if propagation.chooses(x, len(layers))), None)

    def restart(self, index: int, call: Call) -> Narrowing | None:
        """Choose the part of the prompt that is read, by what its filter layer was handed.

        The tokens of that part close up; None if all of the prompt is read.
        """
        if self.method.granularity == "query":
            call = call.per_query_head()
        with writable():
            narrowing = self._cuts.propagate(index, call, append_tokens(None, call, self._now))
        if narrowing is not None:
            whole, part = self._cuts.whole.lengths(), narrowing.now.lengths()
            self.state.closed_up = [n - m for n, m in zip(whole, part, strict=True)]
            self._cuts.narrow(narrowing)
        return narrowing

    # Inside a pass

    @property
    def _now(self) -> Pass:
        return self._cuts.now

    @property
    def _cuts(self) -> Cuts:
        if self._cutting is None:
            raise CacheError("no forward pass is under way over this cache; call begin first")
        return self._cutting

    def _store(self, index: int, call: Call) -> tuple[Call, LayerStore]:
        """Take in a layer's new entries, making room first where that is due."""
        now, held = self._now, self.state.layers[index]
        self._cuts.attended.add(index)
        held.full_entry = call.keys.shape[1] * call.kv_bytes
        if self.method.granularity == "query":
            call = call.per_query_head()
        if self._plan.before and held.store is not None:
            none = call.queries[:, :, :0]
            self._cuts.cut(index, call, held.store, held.store, none, ahead=True)
        own = {CARRIED: self._cuts.foresee(index, call)} if self._plan.foresee else {}
        held.store = append_tokens(held.store, call, now, own)
        return call, held.store

    def _show(self, call: Call, store: LayerStore) -> LayerStore:
        """The entries as this pass's queries see them: keys turned to their slots if asked."""
        reading = self.in_prompt and not self.method.schedule.chunks
        if self.method.positions == "original" or reading or not self.state.cut_at:
            return store
        return roll(store, call, [length - 1 for length in self._now.lengths()])

    def _observe(
        self, index: int, call: Call, store: LayerStore, shown: LayerStore, attend: bool
    ) -> Float[Tensor, "B H Q E"] | None:
        """Let the policy observe, if due; attention's output, if that came out on the way."""
        if not self._plan.observe:
            return None
        free = self._plan.probe and self.impl in ("auto", "sdpa") and not call.queries.is_cuda
        return self._cuts.observe(index, call, store, shown, attend and free)

    def _choose_on(self, index: int, call: Call, shown: LayerStore) -> Narrowing | None:
        """Before a layer's new tokens attend: choose those that go on, if due.

        Those alone need attention: of the others nothing is asked above.
        """
        propagation = self.method.propagation
        if not self._plan.propagate or propagation.restarts:
            return None
        if not propagation.chooses(index, len(self.state.layers)):
            return None
        return self._cuts.propagate(index, call, shown)

    def _finish(self, index: int, call: Call, store: LayerStore, shown: LayerStore) -> None:
        """After a layer's new tokens have attended: evict, keep what is needed later."""
        plan, held = self._plan, self.state.layers[index]
        if plan.probe:
            store.forget_from(self._now.first)
        known = self._cuts.known
        if plan.observe and known is not None and (plan.after or not plan.probe):
            known.statistics.setdefault(index, store.column(CARRIED).clone())
        if self.in_prompt or plan.probe:
            self._cuts.refer(index, call)
        if plan.after or plan.again:
            lookback = max(plan.lookback, plan.asked)
            last = last_queries(held.queries, call.queries, self._now, lookback)
            hidden = call.hidden if self.method.policy.reads_hidden else None
            hidden = last_hidden(held.hidden, hidden, self._now, lookback)
            if plan.after:
                self._cuts.cut(index, call, store, shown, last, hidden=hidden)
            held.remember(last, hidden, lookback if plan.again else 0)
        store.settle()
        if (plan.observe or plan.foresee) and not plan.carry:
            store.drop_column(CARRIED)
        if plan.probe and plan.after:
            store.cut_back(store.length)
