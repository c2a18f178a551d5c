"""What one pass evicts: each layer as the policy sees it, and the cuts that follow."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from kvtrim.cache.store import BIAS, LayerStore
from kvtrim.engine.eviction import Cutters, Evictor, merge
from kvtrim.engine.generated import trimmers
from kvtrim.engine.layer import Call, real_queries
from kvtrim.engine.propagation import Narrowing, narrow_pass
from kvtrim.engine.refit import (
    BEHIND,
    Aims,
    Refitting,
    gather_references,
    of_one_use,
    references_of_head,
)
from kvtrim.engine.state import CARRIED, State
from kvtrim.engine.tokens import Pass
from kvtrim.errors import UsageError
from kvtrim.kernels import explicit
from kvtrim.methods.keep import Keep
from kvtrim.methods.method import Method
from kvtrim.methods.policies.base import checked_statistic
from kvtrim.types import Float, Kept, LayerView, Probed, Tensor

SCORE = "score"  # the store's column for scores, while layers compete for one budget


@dataclass
class Known:
    """What equal passes under one policy came to, so that other budgets need not see it again."""

    statistics: dict[int, Tensor] = field(default_factory=dict)  # what `observe` found, by layer
    aims: Aims | None = None  # what the full cache answered to reference queries


@dataclass
class Cuts:
    """The cuts of one pass over all layers of a session."""

    method: Method
    keep: Keep
    state: State
    now: Pass  # as the layer at hand sees it
    prompt: bool  # the pass reads the prompt
    coming: int = 0  # columns of the prompt that later passes bring
    due: Sequence[bool] | None = None  # prompts that are cut in this pass; all if not said
    probed: list[Probed] | None = None  # the pass probes these parts of each prompt
    known: Known | None = None  # of an equal pass
    narrowing: Narrowing | None = None  # what the layer at hand and those above it read
    whole: Pass = field(init=False)  # as the model was handed it
    evicted: bool = False  # entries are gone that the pass found
    attended: set[int] = field(default_factory=set)  # layers that have stored what is new
    _cutters: Cutters = field(default_factory=list)

    def __post_init__(self) -> None:
        self.whole = self.now
        aims = None if self.known is None else self.known.aims
        self._refitting = Refitting(self.method.refit, aims)

    def observe(
        self, index: int, call: Call, store: LayerStore, shown: LayerStore, attend: bool = False
    ) -> Float[Tensor, "B H Q E"] | None:
        """Let the policy update its running statistic with this pass's queries.

        Args:
            attend: attention may be worked out on the way, if the policy knows what to note.

        Returns:
            The output of attention, if it was worked out; zeros for padding.
        """
        store.add_column(CARRIED)
        if self.known is not None and index in self.known.statistics:
            store.set_column(CARRIED, self.known.statistics[index])
            return None
        policy, out = self.method.policy, call.no_output() if attend else None
        for rows in self._groups(self.now):
            queries = real_queries(call.queries, self.now, rows)
            if queries.shape[2]:
                own = self._hidden(call, rows), self._sensitivity(index, rows)
                view = self._view(index, call, self._part(shown, rows), queries, rows, 0, *own)
                noted = policy.compared(view) if out is not None else None
                dense = view.lengths is None and view.bias is None
                if out is not None and noted is not None and dense:
                    given = queries, view.keys, view.values, noted, view.scale, view.softcap
                    mixed, most = explicit.largest(*given)
                    columns = slice(None) if self.now.real is None else self.now.real[rows.start]
                    out[rows, :, columns] = mixed
                    view = replace(view, received=most)
                else:
                    out = None
                self._part(store, rows).set_column(CARRIED, checked_statistic(policy, view))
        return out

    def foresee(self, index: int, call: Call) -> Float[Tensor, "B K Q"]:
        """What the policy says of a layer's new tokens, padding included, for every head stored.

        Raises:
            UsageError: their hidden states were not handed over.
        """
        if call.hidden is None:
            raise UsageError("this method reads hidden states; pass hidden=[states, ...]")
        own = self.method.policy.foresee(index, call.hidden, call.keys, call.values)
        return own.repeat_interleave(call.keys.shape[1] // own.shape[1], dim=1)

    def refer(self, index: int, call: Call) -> None:
        """Gather reference queries, if any are wanted: the probe's, or else the prompt's own."""
        refit, counts = self.method.refit, self._references(call)
        if not counts or self.method.policy.probes != (self.probed is not None):
            return
        totals = [length + self.coming for length in self._lengths(self.whole)]
        held = self.state.layers[index]
        behind = refit.behind if refit.changes else BEHIND
        given = counts, behind, call, self.now, held, totals, self.probed
        held.references = gather_references(*given)

    def propagate(self, index: int, call: Call, shown: LayerStore) -> Narrowing | None:
        """Choose the tokens that the layers above this one read; None if all of them do."""
        chosen, policy = [], self.method.policy
        for rows, cutter in self._cutters_for(call, ahead=False):
            prompt, slots = self.whole.lengths()[rows.start], None
            if prompt > cutter.keep:
                queries = real_queries(call.queries, self.now, rows)
                part = self._part(shown, rows)
                hidden = self._hidden(call, rows)
                view = self._view(index, call, part, queries, rows, cutter.keep, hidden)
                slots = self.method.propagation.choose(view, policy, prompt)
            chosen.append((rows, slots))
        return narrow_pass(index, self.now, chosen, self.narrowing)

    def narrow(self, narrowing: Narrowing) -> None:
        """The layers from here on read a part of the prompt."""
        self.narrowing, self.now, self.evicted = narrowing, narrowing.now, True
        self.state.cut_at = self.state.reading.seen + self.whole.columns

    def cut(
        self,
        index: int,
        call: Call,
        store: LayerStore,
        shown: LayerStore,
        last: Tensor,
        ahead: bool = False,
        hidden: Tensor | None = None,
    ) -> None:
        """Evict from one layer what exceeds its budget.

        Args:
            store, shown: what the layer holds, and the same as this pass's queries see it.
            last: the last queries, as many as the policy looks back to.
            ahead: the new tokens are still to come: leave room for them.
            hidden: what the attention received for them, where the policy reads it.
        """
        competing, refits = self.method.budget.model_wide, self.method.refit.changes
        references, self.state.layers[index].references = self.state.layers[index].references, None
        if competing:
            store.add_column(SCORE)
        parts = []
        for rows, cutter in self._cutters_for(call, ahead):
            own, part = None if hidden is None else hidden[rows], self._part(shown, rows)
            view = self._view(index, call, part, last[rows], rows, cutter.keep, own)
            if self._whole:
                view = replace(
                    view, whole=True, asked=self._queries_to_ask(call, references, rows)
                )
            if refits and isinstance(cutter, Evictor) and cutter.cuts and references is not None:
                given = self._fitted_on(call, references, rows)
                self._refitting.aim(index, view, rows, given)
            won = self.state.layers[index].share_of(rows) if self.method.budget.settles else None
            parts.append((rows, cutter.choose(view, won)))
            if cutter.scored is not None:
                self._part(store, rows).set_column(SCORE, cutter.scored)
        self._retain(store, merge(parts, store.length), ahead)
        if competing:
            store.settle()
            self._cut_again(index)
        elif refits and references is not None:
            self._refitting.apply(index, store)

    def _references(self, call: Call) -> list[int]:
        """How many reference queries of each query head are gathered, for each use."""
        refit, policy = self.method.refit, self.method.policy
        asked = 0 if self.method.schedule.chunks else policy.asked
        wanted = (refit.queries if refit.changes else 0, asked)
        return [references_of_head(count, call) for count in wanted if count]

    def _queries_to_ask(
        self, call: Call, references: Sequence[Tensor] | None, rows: slice
    ) -> Float[Tensor, "B H r D"] | None:
        """Those of a group's reference queries that the policy asks."""
        asked = self.method.policy.asked
        if references is None or not asked:
            return None
        total, counts = self._lengths(self.whole)[rows.start], self._references(call)
        given = torch.stack(list(references[rows]))
        return of_one_use(given, counts, references_of_head(asked, call), total)

    def _fitted_on(
        self, call: Call, references: Sequence[Tensor], rows: slice
    ) -> Sequence[Tensor]:
        """Those of a group's reference queries that are for the refit."""
        counts = self._references(call)
        if len(counts) == 1:
            return references
        total = self._lengths(self.whole)[rows.start]
        return [of_one_use(own, counts, counts[0], total) for own in references]

    @property
    def _whole(self) -> bool:
        """The prompt is complete, and what is cut from is all of it."""
        return (self.prompt or self.probed is not None) and not (
            self.coming or self.method.schedule.chunks or self.narrowing
        )

    def _cut_again(self, index: int) -> None:
        """Layers compete: what this one won, the earlier ones lose; the last one settles it."""
        layers, last = self.state.layers, index == len(self.state.layers) - 1
        read = [(at, held.store) for at, held in enumerate(layers[: index + 1])]
        stores = [(at, store) for at, store in read if store is not None]
        late = [
            bool(cutter.dealt) and (last or cutter.late([x.length[rows] for _, x in stores]))
            for rows, cutter in self._cutters
        ]
        for earlier, store in stores if any(late) else []:
            parts: list[tuple[slice, Kept | None]] = []
            for due, (rows, cutter) in zip(late, self._cutters, strict=True):
                kept = None
                if due and earlier < index:
                    scores = self._part(store, rows).column(SCORE)
                    kept = cutter.again(earlier, scores, store.length[rows])
                parts.append((rows, kept))
            self._retain(store, merge(parts, store.length))
        for layer, held in enumerate(layers if last else []):
            if held.store is not None:
                held.store.drop_column(SCORE)
                if self._refitting.aims:
                    self._refitting.apply(layer, held.store)
            for rows, cutter in self._cutters:
                held.settle_share(rows, self.now.rows, cutter.dealt, layer)

    def _retain(self, store: LayerStore, kept: Kept | None, ahead: bool = False) -> None:
        if kept is not None:
            self.evicted = True
            store.retain(kept)
            new = 0 if ahead or self.probed else self.whole.columns
            self.state.cut_at = self.state.reading.seen + new

    def _cutters_for(self, call: Call, ahead: bool) -> Cutters:
        if not self._cutters:
            self._cutters = self._new_cutters(call, ahead)
        return self._cutters

    def _new_cutters(self, call: Call, ahead: bool) -> Cutters:
        due = self.due or [True] * self.now.rows
        groups = [rows for rows in self._groups(self.whole) if due[rows.start]]
        if not (self.prompt or self.probed) and self.method.schedule.region != "all":
            return trimmers(self.method, self.state, self.now, groups)
        if self.prompt or self.probed:
            layers, policy = len(self.state.layers), self.method.policy
            again = self.method.schedule.every is not None
            columns = (again and policy.observes(decoding=True)) + self.method.refit.biases
            beside = columns * torch.float32.itemsize
            entry = layers * call.keys.shape[1] * (call.entry_bytes + beside) * self.now.rows
            count = policy.remembers() if again else 0
            remembered = call.remembered_bytes(count, policy.reads_hidden)
            keep = self.keep.beside(layers * remembered)
            lengths = [length + self.coming for length in self._lengths(self.whole)]
            self.state.keeps = [self._budget(keep, length, entry) for length in lengths]
        cutters, read = [], self._lengths(self.whole)
        decoding = not (self.prompt or self.probed)
        for rows in groups:
            (keep, asked), tokens = self.state.keeps[rows.start], read[rows.start]
            room = max(1, keep - (tokens - self.whole.first[rows.start])) if ahead else keep
            cutters.append((rows, Evictor(self.method, room, asked, tokens, decoding)))
        return cutters

    def _groups(self, of: Pass) -> list[slice]:
        """Prompts that are seen together: those alike in all that scores and cuts depend on.

        The others are seen alone, so that a prompt keeps in any batch what it keeps alone.
        """
        together = of.groups()
        if len(together) > 1 or self._alike:
            return together
        return [slice(row, row + 1) for row in range(of.rows)]

    @cached_property
    def _alike(self) -> bool:
        """Prompts of one length have the same budget, schedule, and entries in every head."""
        state = self.state
        listed = (state.keeps, state.generated, self.due or [])
        if any(one != each[0] for each in listed for one in each):
            return False
        return all(bool((store.length == store.length[:1]).all()) for store in state.stores())

    def _budget(self, keep: Keep, length: int, entry_bytes: int) -> tuple[int, float]:
        """Entries per head for a prompt of this length, and the same before rounding."""
        asked, policy = keep.per_head(length, entry_bytes), self.method.policy
        protected = policy.sinks + policy.recent(int(asked))
        return keep.entries(length, protected, entry_bytes), asked

    def _lengths(self, of: Pass) -> list[int]:
        """Tokens of each prompt after a pass; those of a probe do not count."""
        return of.first if self.probed else of.lengths()

    def _part(self, store: LayerStore, rows: slice) -> LayerStore:
        everyone = rows.stop - rows.start == self.now.rows
        return store if everyone else store.row(rows.start)

    def _hidden(self, call: Call, rows: slice) -> Tensor | None:
        """What the attention received for a group's new tokens."""
        if call.hidden is None:
            return None
        return real_queries(call.hidden[:, None], self.now, rows)[:, 0]

    def _sensitivity(self, index: int, rows: slice) -> Float[Tensor, "B Q"] | None:
        """That of a group's probe tokens, where the policy differentiates."""
        given = [each.sensitivity for each in (self.probed or [])[rows]]
        found = [each[index] for each in given if each is not None]
        return torch.stack(found) if found else None

    def _view(
        self,
        index: int,
        call: Call,
        store: LayerStore,
        queries: Tensor,
        rows: slice,
        keep: int,
        hidden: Tensor | None = None,
        sensitivity: Tensor | None = None,
    ) -> LayerView:
        dense, lengths = store.dense()
        return LayerView(
            index=index,
            layers=len(self.state.layers),
            keep=keep,
            tokens=self._lengths(self.now)[rows.start],
            queries=queries,
            keys=dense["keys"],
            values=dense["values"],
            positions=dense["positions"],
            scale=call.scale,
            softcap=call.softcap,
            lengths=lengths,
            carried=dense.get(CARRIED),
            decoding=not self.prompt,
            probed=None if self.probed is None else self.probed[rows.start],
            sensitivity=sensitivity,
            hidden=hidden,
            output=call.output,
            factor=call.factor,
            rotate=call.rotate,
            bias=dense.get(BIAS),
            spans=tuple(self.state.spans[rows]),
        )
