"""What a generation has come to: what was read, what each layer holds, and how to go back.

Also what is to be said of it. `keep` is entries per KV head on average over the model. Some
methods cannot hold just that: query heads that store entries of their own, layers that read a part
of the prompt, parts that are kept as a whole. Whoever answers says so, once.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from kvtrim.cache.store import LayerStore, Reach
from kvtrim.engine.layer import Call, Held
from kvtrim.engine.tokens import Pass, Reading
from kvtrim.errors import UsageError
from kvtrim.methods.keep import Keep
from kvtrim.methods.method import Method
from kvtrim.prompts.spans import per_row, require_within
from kvtrim.types import Int, Spans, Tensor

CARRIED = "carried"
"""The store's column for a policy's running statistic."""

CLEARLY = 0.05
"""What is held differs clearly from what was asked by more than this share of it, and an entry."""


@dataclass
class State:
    """Everything about a batch of prompts that changes while it is read and generated."""

    layers: list[Held]
    reading: Reading = field(default_factory=Reading)
    keeps: list[tuple[int, float]] = field(default_factory=list)
    """For each prompt the entries per head it may keep, and the same before rounding."""
    settled: list[tuple[int, float]] = field(default_factory=list)
    """For each prompt its tokens, and the entries per KV head that it held, on average over the
    layers, once it was complete."""
    cut_at: int = 0
    """Columns read when entries were last evicted; none of those can be taken back."""
    due_at: list[int] = field(default_factory=list)
    """For each prompt its tokens when a cut was last due."""
    probed: bool = False
    """The prompts were probed, if the policy does that, and cut."""
    spans: list[Spans] = field(default_factory=list)
    """For each prompt its named parts, if any were given."""
    generated: list[tuple[int, float]] = field(default_factory=list)
    """For each prompt where its generated tokens begin and what share of them stays, for methods
    that evict among those alone."""
    prompt_tokens: int | None = None
    """Columns of this prompt, if it comes in several passes and whoever feeds it said so."""
    expected: int = 0
    """Columns announced as handed over, not generated."""
    closed_up: list[int] = field(default_factory=list)
    """For each prompt how far its tokens moved up when the model started again on a part of it;
    empty if it never did."""
    added: int = 0
    """Tokens since the prompt, its answer included, when one more turn of several came last that
    nobody had announced."""
    appended_from: int = 0
    """Columns read from which on entries were only appended."""
    past: "list[Past]" = field(default_factory=list)
    """The newest of the other passes as far as they can be taken back, oldest first."""

    @classmethod
    def empty(cls, layers: int) -> "State":
        """Nothing read yet."""
        return cls([Held() for _ in range(layers)])

    @property
    def held_bytes(self) -> int:
        """Bytes held for all prompts, slack included, measured from the tensors."""
        return sum(each.nbytes for each in (*self.layers, *self.past))

    @property
    def full_bytes(self) -> int:
        """Bytes of the K and V of everything read, had nothing been evicted."""
        tokens = self.reading.seen * len(self.reading.lengths)
        return tokens * sum(held.full_entry for held in self.layers)

    @property
    def entry_bytes(self) -> int:
        """Bytes of one more entry in every head of every layer, for all prompts."""
        heads = sum(store.length.shape[1] for store in self.stores())
        per_prompt = sum(held.full_entry for held in self.layers) + 4 * heads
        return per_prompt * len(self.reading.lengths)

    def stores(self) -> list[LayerStore]:
        """The store of every layer that has read something."""
        return [held.store for held in self.layers if held.store is not None]

    def take_back(self, columns: int) -> None:
        """Forget the newest columns, since which entries were only appended."""
        self.forget_from(self.reading.forget(columns))

    def forget_from(self, lengths: list[int]) -> None:
        """Drop the entries of every prompt that stand at its length or later."""
        pairs = zip(self.generated, lengths, strict=False)
        self.generated = [(min(start, length), share) for (start, share), length in pairs]
        self.due_at = [min(pair) for pair in zip(self.due_at, lengths, strict=False)]
        for held in self.layers:
            if held.store is not None:
                held.store = held.store.shorten(held.store.before(lengths))

    def settle(self) -> None:
        """The prompts are complete: remember what is held of them."""
        layers = [(held, held.store) for held in self.layers if held.store is not None]
        heads = sum(held.kv_heads for held, _ in layers)
        held = torch.stack([store.length.sum(dim=-1) for _, store in layers]).sum(dim=0) / heads
        self.settled = list(zip(self.reading.lengths, held.tolist(), strict=True))

    def schedule(self, due: Sequence[bool], closes: Sequence[bool], share: float | None) -> None:
        """A pass was read: remember which prompts were cut, and what of them is not generated.

        Args:
            due: prompts from which it evicted; none of them if empty.
            closes: prompts whose tokens so far are not generated, what follows is; likewise.
            share: of the generated tokens, that stays; None: the prompt's own.
        """
        lengths, none = self.reading.lengths, [False] * len(self.reading.lengths)
        due, closes, before = due or none, closes or none, self.due_at or [0] * len(none)
        self.due_at = [
            length if cut or closed else at
            for length, at, cut, closed in zip(lengths, before, due, closes, strict=True)
        ]
        if any(closes):
            shares = [own for _, own in self.generated] or [
                min(1.0, asked / max(1, length)) if share is None else share
                for (_, asked), length in zip(self.keeps, lengths, strict=False)
            ]
            starts = [start for start, _ in self.generated] or lengths
            self.generated = [
                (length if closed else start, own)
                for closed, length, start, own in zip(
                    closes, lengths, starts, shares, strict=False
                )
            ]

    def name(self, spans: list[Spans], now: Pass, complete: bool) -> None:
        """Give each prompt its named parts when it begins; check them once it is complete.

        Raises:
            UsageError: they are of another number of prompts, or reach beyond one.
        """
        if self.reading.seen == 0:
            self.spans = per_row(spans, now.rows)
        if complete:
            require_within(self.spans, now.lengths())

    def select_rows(self, rows: Int[Tensor, " R"]) -> None:
        """Keep these prompts in this order; one may occur several times (beam search)."""
        self.past = []
        self.reading.select(rows)
        own = ("keeps", "settled", "due_at", "spans", "generated", "closed_up")
        for name in own:
            given = getattr(self, name)
            setattr(self, name, [given[row] for row in rows.tolist()] if given else [])
        for held in self.layers:
            held.store = None if held.store is None else held.store.select_rows(rows)
            if held.queries is not None:
                held.queries = held.queries[rows.to(held.queries.device)]
            if held.references is not None:
                held.references = tuple(held.references[row] for row in rows.tolist())
            if held.hidden is not None:
                held.hidden = held.hidden[rows.to(held.hidden.device)]
            if held.share is not None:
                held.share = held.share[rows.cpu()]

    def copy(self) -> "State":
        """An independent state, its entries packed."""
        return self._with([held.copy() for held in self.layers])

    def mark(self, evicts: bool) -> "Mark":
        """Remember this state. Entries are copied only if what follows may evict them."""
        if evicts:
            return Mark(self.copy(), None)
        reaches = [held.store and held.store.reach() for held in self.layers]
        return Mark(self._with([copy.copy(held) for held in self.layers]), reaches)

    def _with(self, layers: list[Held]) -> "State":
        reading, keeps = copy.copy(self.reading), list(self.keeps)
        return replace(self, layers=layers, reading=reading, keeps=keeps, past=[])


@dataclass(frozen=True, eq=False)
class Mark:
    """A state to come back to, any number of times.

    Where a method only appends, the stores are shared with the live state and `reaches` says how
    far they reached, which keeps them from being cut back further; where it may evict, they are
    copies.
    """

    state: State
    reaches: list[Reach | None] | None
    owner: object = None  # whose state it is

    def restore(self) -> State:
        """The state as it was."""
        if self.reaches is None:
            return self.state.copy()
        back = self.state._with([copy.copy(held) for held in self.state.layers])
        for held, reach in zip(back.layers, self.reaches, strict=True):
            if held.store is not None and reach is not None:
                held.store = held.store.shorten(reach.length)
        return back


@dataclass
class Past:
    """One pass."""

    mark: Mark  # of the state that it found
    carried: list[Tensor | None]  # the policy's statistic of every layer, where stores are shared
    # and it may change
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
    def begin(
        cls,
        state: State,
        columns: int,
        mask: Tensor | None,
        evicts: bool,
        keeps_calls: bool,
        changes: bool,
    ) -> "Past":
        """A pass is about to begin.

        Args:
            evicts: it may evict entries of this state.
            changes: it may change the policy's statistic of entries that are there.
        """
        carried = [
            store.column(CARRIED).clone() if store is not None and store.has(CARRIED) else None
            for store in (held.store for held in state.layers if changes and not evicts)
        ]
        return cls(state.mark(evicts), carried, columns, mask, keeps_calls)

    def note(self, index: int, call: Call, hidden: bool) -> None:
        """Remember what a layer was handed."""
        if self.keeps_calls:
            self.calls[index] = call if hidden else replace(call, hidden=None)

    def restore(self) -> State:
        """The state that it found."""
        state = self.mark.restore()
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


def remark(method: Method, keep: Keep, state: State) -> str | None:
    """One sentence where a prompt holds clearly more or less than was asked for it, else None.

    Of several prompts, about the one that is furthest off. None too while the prompt is not
    complete, and for a method that is not meant to evict.
    """
    if method.full or not state.settled or not state.keeps:
        return None
    group = _group(state)
    found = []
    for (tokens, held), (_, asked) in zip(state.settled, state.keeps, strict=True):
        if not tokens:  # padding alone
            continue
        asked *= group if keep.kind == "bytes" else 1  # bytes count the heads that are stored
        found.append((held, min(asked, float(tokens)), tokens))
    if not found:
        return None
    held, asked, tokens = max(found, key=lambda one: abs(one[0] / one[1] - 1))
    if not _apart(held, asked):
        return None
    reasons = _more(method, held, asked, group) if held > asked else method.holds_less
    text = (
        f"keep={keep} asks for {asked:,.0f} of {tokens:,} entries per KV head, "
        f"{held:,.0f} are held"
    )
    return f"{text}: {'; '.join(reasons)}" if reasons else text


def remark_later(method: Method, keep: Keep, state: State) -> str | None:
    """What is held beyond the budget because it came after the prompt, and what to do; or None."""
    if method.schedule.every is not None or method.full or not state.keeps:
        return None
    if state.added <= max(kept for kept, _ in state.keeps):
        return None
    return (
        f"keep={keep} was applied to the prompt, the first pass over this cache; later passes, "
        "and answers before them, are added to it and never evicted. If they belong to the "
        f"prompt, pass prompt_tokens=LENGTH; {_remedy(method)}"
    )


def _remedy(method: Method) -> str:
    """How to evict in further turns."""
    try:
        replace(method, schedule=replace(method.schedule, every=64))
    except UsageError:
        return (
            "this method cannot evict again after the prompt: read each further turn with all "
            "before it into a new cache, or take a method that can, with every=64"
        )
    return "to evict in further turns too, pass every=64, or another number of tokens"


def _apart(held: float, asked: float) -> bool:
    return abs(held - asked) > max(1, CLEARLY * asked)


def _more(method: Method, held: float, asked: float, group: int) -> list[str]:
    """Why a method holds more than it was asked for."""
    reasons = [f"every query head stores its own, {group} per KV head"] if group > 1 else []
    protected = method.policy.sinks + method.policy.recent(int(asked))
    if protected >= asked:
        reasons.append(f"window and sinks alone are {protected}")
    return [*reasons, *(method.holds_more if _apart(held / group, asked) else [])]


def _group(state: State) -> int:
    """Heads that store entries of their own, per KV head of the model."""
    held = next(held for held in state.layers if held.store is not None)
    return held.heads // held.kv_heads
