"""A policy that reads hidden states sees what each layer's attention received, token by token."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
import torch

import kvtrim
import models
from kvtrim.errors import UsageError
from kvtrim.hf.batch import join
from kvtrim.hf.models.architectures import layout
from kvtrim.hf.replay import record
from kvtrim.methods.budgets import Global, Uniform
from kvtrim.methods.method import Method
from kvtrim.methods.policies import ops
from kvtrim.methods.policies.base import Policy
from kvtrim.methods.schedule import Schedule

N, KEEP, LOOK = 30, 12, 4


def own_column(layer, values, before):
    """A number per slot: `values` for those of the queries at hand, `before` for the others."""
    count = values.shape[-1]
    first = (ops.lengths(layer) - count)[..., None]
    slots = first + torch.arange(count, device=first.device)
    return before.scatter(-1, slots, values.to(before.dtype))


@dataclass(frozen=True)
class Spy(Policy):
    """Carries the sum of each token's hidden state, and notes every view that it scores."""

    notes: list = field(default_factory=list, compare=False)
    carries: ClassVar[bool] = True
    reads_hidden: ClassVar[bool] = True

    def lookback(self):
        return LOOK

    def observe(self, layer):
        own = layer.hidden.sum(dim=-1)[:, None].expand(-1, layer.keys.shape[1], -1)
        return own_column(layer, own, layer.carried)

    def score(self, layer):
        names = ("hidden", "carried", "positions")  # of a store that changes later on
        self.notes.append(replace(layer, **{name: getattr(layer, name).clone() for name in names}))
        return torch.sin(1e3 * layer.carried)


def received(model, ids):
    """What the attention of every managed layer is handed, [L, n, M], by an untouched model."""
    plan, found = layout(model, allow_untested=True), {}

    def note(index):
        return lambda _, args, kwargs: found.__setitem__(
            index, (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])[0]
        )

    hooks = [
        plan.attention[at].register_forward_pre_hook(note(number), with_kwargs=True)
        for number, at in enumerate(plan.managed)
    ]
    with torch.no_grad():
        model(ids[None])
    for hook in hooks:
        hook.remove()
    return torch.stack([found[index] for index in sorted(found)])


def require_seen(spy, expected):
    """Every noted view has the states of the tokens that it holds, and of its last queries."""
    assert spy.notes
    for view in spy.notes:
        for row in range(len(view.keys)):
            states = expected[view.tokens][view.index]
            at = states[view.tokens - LOOK : view.tokens]
            torch.testing.assert_close(
                view.hidden[row].double(), at.double(), rtol=1e-4, atol=1e-5
            )
            sums = states.sum(dim=-1).double()
            held = view.keys.shape[2] if view.lengths is None else view.lengths[row]
            for head in range(view.keys.shape[1]):
                own = slice(None) if isinstance(held, int) else slice(int(held[head]))
                where = view.positions[row, head, own].long()
                seen = view.carried[row, head, own].double()
                torch.testing.assert_close(seen, sums[where], rtol=1e-5, atol=1e-5)


def test_in_one_pass_of_every_architecture(any_model):
    ids, spy = models.prompt(N), Spy()
    cache = kvtrim.Cache(any_model, Method(spy), KEEP)
    with torch.no_grad(), kvtrim.attach(any_model):
        any_model(ids, past_key_values=cache)
    require_seen(spy, {N: received(any_model, ids[0])})


@pytest.mark.parametrize("budget", [Uniform(), Global()])
def test_in_a_padded_batch(llama, budget):
    one, other = models.prompt(N, seed=1)[0], models.prompt(N - 7, seed=2)[0]
    ids = torch.stack([one, torch.cat([torch.zeros(7, dtype=torch.int64), other])])
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    spy = Spy()
    cache = kvtrim.Cache(llama, Method(spy, budget), KEEP)
    with torch.no_grad(), kvtrim.attach(llama):
        llama(ids, attention_mask=mask, past_key_values=cache)
    assert {view.tokens for view in spy.notes} == {N, N - 7}
    require_seen(spy, {N: received(llama, one), N - 7: received(llama, other)})


@pytest.mark.parametrize("width", [3, 11])
@pytest.mark.parametrize("chunks", [False, True])
def test_in_chunks(llama, width, chunks):
    """Chunks shorter than what is looked back to, too; the last queries' states are remembered."""
    ids, spy = models.prompt(N), Spy()
    method = Method(spy, schedule=Schedule(chunks=chunks))
    cache = kvtrim.Cache(llama, method, KEEP if not chunks else N - 1, prompt_tokens=N)
    with torch.no_grad(), kvtrim.attach(llama):
        for part in ids.split(width, dim=1):
            llama(part, past_key_values=cache)
    states = received(llama, ids[0])
    require_seen(spy, {length: states for length in range(N + 1)})


def test_while_decoding(llama):
    """With nothing evicted by then, the states are those of one pass over all of it."""
    ids, spy = models.prompt(N + 9), Spy()
    cache = kvtrim.Cache(llama, Method(spy, schedule=Schedule(every=3)), N + 8)
    with torch.no_grad(), kvtrim.attach(llama):
        llama(ids[:, :N], past_key_values=cache)
        for column in range(N, N + 9):
            llama(ids[:, column : column + 1], past_key_values=cache)
    assert spy.notes[-1].decoding and spy.notes[-1].tokens == N + 9
    require_seen(spy, {N + 9: received(llama, ids[0])})


def test_a_replayed_pass_hands_on_what_was_recorded(llama):
    ids, spy = models.prompt(N), Spy()
    cache = record(llama, ids).cache(Method(spy), KEEP)
    require_seen(spy, {N: received(llama, ids[0])})
    own = kvtrim.Cache(llama, Method(Spy()), KEEP)
    with torch.no_grad(), kvtrim.attach(llama):
        llama(ids, past_key_values=own)
    assert models.positions(cache) == models.positions(own)


def test_a_pass_recorded_without_them_says_so(llama):
    recording = record(llama, models.prompt(N), hidden=False)
    assert all(call.hidden is None for call in recording.calls)
    recording.cache("snapkv", KEEP, window=4)
    with pytest.raises(UsageError, match="hidden=True"):
        recording.cache(Method(Spy()), KEEP)


def test_select_takes_them_and_asks_for_them(llama):
    ids = models.prompt(N)
    calls = record(llama, ids).calls
    q, k, v, hidden = ([getattr(call, name)[0] for call in calls] for name in FIELDS)
    kept = kvtrim.select(Method(Spy()), q, k, v, keep=KEEP, hidden=hidden)
    own = record(llama, ids).cache(Method(Spy()), KEEP)
    assert [[head.tolist() for head in layer] for layer in kept] == models.positions(own)
    for wrong in (None, hidden[:-1], [one[:-1] for one in hidden]):
        with pytest.raises(UsageError, match="hidden"):
            kvtrim.select(Method(Spy()), q, k, v, keep=KEEP, hidden=wrong)


FIELDS = ("queries", "keys", "values", "hidden")


def test_nothing_is_kept_for_policies_that_do_not_ask(llama):
    for name, settings in (("tova", {}), ("cake", {"window": 4}), ("snapkv", {"window": 4})):
        cache = kvtrim.Cache(llama, name, KEEP, every=1, **settings)
        with torch.no_grad(), kvtrim.attach(llama):
            llama(models.prompt(N), past_key_values=cache)
        assert all(held.hidden is None for held in cache.session.state.layers)


def test_what_is_remembered_is_selected_counted_and_saved(llama, tmp_path):
    cache = kvtrim.Cache(llama, "laprox", KEEP, window=4, norm="resid", every=5)
    ids = models.prompt(N, rows=2)
    with torch.no_grad(), kvtrim.attach(llama):
        llama(ids, past_key_values=cache)
        held = cache.session.state.layers[1]
        assert held.hidden.shape == (2, 4, llama.config.hidden_size)
        assert held.nbytes == held.store.nbytes + held.queries.nbytes + held.hidden.nbytes
        cache.save(tmp_path / "cache")
        again = kvtrim.load_cache(tmp_path / "cache", llama)
        torch.testing.assert_close(again.session.state.layers[1].hidden, held.hidden)
        before = held.hidden
        cache.batch_select_indices(torch.tensor([1, 1]))
        torch.testing.assert_close(cache.session.state.layers[1].hidden, before[[1, 1]])


def test_prompts_continued_abreast_get_their_own(llama):
    ids, spies = models.prompt(N, rows=2), [Spy(), Spy()]
    caches = []
    with torch.no_grad(), kvtrim.attach(llama):
        for row, spy in enumerate(spies):
            method = Method(spy, schedule=Schedule(every=2))
            caches.append(kvtrim.Cache(llama, method, N + 1))
            llama(ids[row : row + 1], past_key_values=caches[-1])
            spy.notes.clear()
        joined = join(caches)
        for column in range(4):
            at = torch.full((2, 1), N + column)
            llama(ids[:, column : column + 1], past_key_values=joined, position_ids=at)
    for row, spy in enumerate(spies):
        whole = torch.cat([ids[row], ids[row, :4]])
        first = [view for view in spy.notes if view.tokens == N + 2]  # before anything is evicted
        spy.notes[:] = first
        require_seen(spy, {N + 2: received(llama, whole)})
