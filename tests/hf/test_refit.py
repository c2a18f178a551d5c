"""A refit in a model: which queries it asks, when it is done, and where its numbers go."""

import pytest
import torch

import kvtrim
import models
from kvtrim.errors import UsageError
from kvtrim.hf.batch import join
from kvtrim.hf.replay import record
from kvtrim.hf.rotary import rotations
from kvtrim.methods.refit import LeastSquares, aim_of
from small import small

N, KEEP = 64, 16
REFIT = {"refit": "values", "queries": 48}
BOTH = {"refit": "values+bias", "queries": 48}


def read(model, cache, ids, *widths, **given):
    with torch.no_grad(), kvtrim.attach(model):
        for part in ids.split(list(widths) or [ids.shape[1]], dim=1):
            model(part, past_key_values=cache, **given)
    return cache


def heads_of(cache, name, row=0):
    """One buffer of a cache: a list of tensors for each layer, one per head."""
    found = []
    for store in cache.session.state.stores():
        runs = zip(store.start[row].tolist(), store.length[row].tolist(), strict=True)
        found.append([store.buffers[name][first : first + count] for first, count in runs])
    return found


def turned(model, call, layer, positions, n, behind):
    """Queries of one layer as if they stood behind the prompt."""
    own = call.queries[0][:, positions]
    by = torch.tensor([n + behind - at for at in positions])
    return torch.stack([rotations(model)[layer](head, by) for head in own])


@pytest.mark.parametrize("settings", [REFIT, BOTH])
@pytest.mark.parametrize("name", ["snapkv", "adakv", "echo", "echo-window", "knorm"])
def test_entries_become_what_the_formula_says_and_the_same_ones_stay(llama, name, settings):
    ids, own = models.prompt(N), small(name)
    plain = read(llama, kvtrim.Cache(llama, name, KEEP, **own), ids)
    cache = read(llama, kvtrim.Cache(llama, name, KEEP, **own, **settings), ids)
    assert models.positions(cache) == models.positions(plain)
    positions = [at for at in range(N) if at * 16 // N != (at - 1) * 16 // N]
    assert len(positions) == 16  # 48 for each KV head, of which 3 query heads have a third each
    refit = LeastSquares(bias="bias" in settings["refit"], queries=48)
    last = min(refit.last, cache.session.method.policy.lookback())  # the question's, as they are
    assert (last > 0) is (name not in ("echo", "knorm"))
    changed = 0
    for layer, call in enumerate(record(llama, ids).calls):
        queries = turned(llama, call, layer, positions, N, 64)
        queries = torch.cat([queries, call.queries[0][:, N - last :]], dim=1)
        queries = queries.unflatten(0, (2, 3)).flatten(1, 2)
        aim = aim_of(queries, call.keys[0], call.values[0], call.scale)
        for head, kept in enumerate(models.positions(cache)[layer]):
            part = slice(head, head + 1)
            alone = type(aim)(aim.queries[part], aim.out[part], aim.lse[part])
            keys, values = call.keys[0][part][:, kept], call.values[0][part][:, kept]
            lengths = torch.tensor([[len(kept)]])
            became = refit.fit(alone, keys, values, lengths, call.scale, None)
            new = heads_of(cache, "values")[layer][head]
            torch.testing.assert_close(new, became.values[0], rtol=5e-3, atol=1e-3)
            changed += not torch.allclose(new, values[0])
            if refit.bias:
                bias = heads_of(cache, "bias")[layer][head]
                torch.testing.assert_close(bias, became.bias[0], rtol=5e-3, atol=1e-3)
    assert changed >= 2


@pytest.mark.parametrize("settings", [REFIT, BOTH])
def test_attention_afterwards_is_that_of_the_new_entries(llama, settings):
    """The reference over what is held, biases added, gives the logits that the cache gives."""
    ids = models.prompt(N + 5)
    fast = read(llama, kvtrim.Cache(llama, "echo", KEEP, **small("echo"), **settings), ids[:, :N])
    slow = fast.copy()
    slow.session.impl = "reference"
    with torch.no_grad(), kvtrim.attach(llama):
        for step in (slice(N, N + 1), slice(N + 1, N + 5)):
            a = llama(ids[:, step], past_key_values=fast).logits
            b = llama(ids[:, step], past_key_values=slow).logits
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    if settings is BOTH:
        for layer in heads_of(fast, "bias"):
            for head in layer:
                assert not head[-5:].any()  # what is read later has none
        assert any(head.any() for layer in heads_of(fast, "bias") for head in layer)


def test_in_chunks_it_asks_the_same_queries(llama):
    ids, settings = models.prompt(N), {**small("snapkv"), **BOTH}
    once = read(llama, kvtrim.Cache(llama, "snapkv", KEEP, **settings), ids)
    parts = kvtrim.Cache(llama, "snapkv", KEEP, prompt_tokens=N, **settings)
    read(llama, parts, ids, 9, 30, 25)
    for name in ("values", "bias"):
        for a, b in zip(heads_of(once, name), heads_of(parts, name), strict=True):
            for own, other in zip(a, b, strict=True):
                torch.testing.assert_close(own, other, rtol=5e-3, atol=1e-3)


def test_saved_between_chunks_it_goes_on_as_before(llama, tmp_path):
    ids, settings = models.prompt(N), {**small("snapkv"), **REFIT}
    cache = kvtrim.Cache(llama, "snapkv", KEEP, prompt_tokens=N, **settings)
    read(llama, cache, ids[:, :40], 25, 15)
    cache.save(tmp_path / "cache")
    again = kvtrim.load_cache(tmp_path / "cache", llama)
    for each in (cache, again):
        read(llama, each, ids[:, 40:])
    for a, b in zip(heads_of(cache, "values"), heads_of(again, "values"), strict=True):
        assert all(torch.equal(own, other) for own, other in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ["snapkv", "echo"])
def test_a_padded_batch_equals_its_prompts_alone(llama, name):
    one, other = models.prompt(N, seed=1)[0], models.prompt(N - 9, seed=2)[0]
    ids = torch.stack([one, torch.cat([torch.zeros(9, dtype=torch.int64), other])])
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    settings = {**small(name), **BOTH}
    both = kvtrim.Cache(llama, name, KEEP, **settings)
    read(llama, both, ids, attention_mask=mask)
    for row, alone in enumerate((one, other)):
        cache = read(llama, kvtrim.Cache(llama, name, KEEP, **settings), alone[None])
        for kind in ("values", "bias"):
            for a, b in zip(heads_of(both, kind, row), heads_of(cache, kind), strict=True):
                for own, wanted in zip(a, b, strict=True):
                    torch.testing.assert_close(own, wanted, rtol=5e-3, atol=1e-3)


def test_where_the_policy_probes_its_probe_is_asked(llama):
    ids, seen = models.prompt(N), {}
    cache = kvtrim.Cache(llama, "kvzip", KEEP, chunk=32, **REFIT)
    plain = read(llama, kvtrim.Cache(llama, "kvzip", KEEP, chunk=32), ids)
    cache.session._tap = lambda index, call: seen.setdefault(index, []).append(call.queries[0])
    assert cache.rotations == []
    read(llama, cache, ids)
    assert models.positions(cache) == models.positions(plain)
    for layer, call in enumerate(record(llama, ids).calls):
        _, *probes = seen[layer]  # the prompt's own, then one pass for each chunk
        asked = []
        for queries in probes:
            count = queries.shape[1]
            asked.append(
                queries[:, [at for at in range(count) if at * 8 // count != (at - 1) * 8 // count]]
            )
        queries = torch.cat(asked, dim=1).unflatten(0, (2, 3)).flatten(1, 2)
        aim = aim_of(queries, call.keys[0], call.values[0], call.scale)
        for head, kept in enumerate(models.positions(cache)[layer]):
            part = slice(head, head + 1)
            alone = type(aim)(aim.queries[part], aim.out[part], aim.lse[part])
            given = call.keys[0][part][:, kept], call.values[0][part][:, kept]
            lengths = torch.tensor([[len(kept)]])
            became = LeastSquares(queries=48).fit(alone, *given, lengths, call.scale, None)
            new = heads_of(cache, "values")[layer][head]
            torch.testing.assert_close(new, became.values[0], rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["snapkv", "kvzip", "echo"])
def test_a_replayed_cache_equals_its_own_prefill_for_every_budget(llama, name):
    ids, recording = models.prompt(N), record(llama, models.prompt(N))
    for keep in (KEEP, 24):
        settings = {**small(name), **BOTH}
        own = read(llama, kvtrim.Cache(llama, name, keep, **settings), ids)
        again = recording.cache(name, keep, **settings)
        for kind in ("values", "bias"):
            for a, b in zip(heads_of(own, kind), heads_of(again, kind), strict=True):
                assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_probe_that_was_read_for_its_scores_is_read_again_for_its_queries(llama):
    ids, recording = models.prompt(N), record(llama, models.prompt(N))
    plain = recording.cache("kvzip", KEEP, chunk=32)
    refitted = recording.cache("kvzip", KEEP, chunk=32, **REFIT)
    own = read(llama, kvtrim.Cache(llama, "kvzip", KEEP, chunk=32, **REFIT), ids)
    assert models.positions(plain) == models.positions(refitted)
    for a, b in zip(heads_of(own, "values"), heads_of(refitted, "values"), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    again = recording.cache("kvzip", KEEP, chunk=32)
    assert models.positions(plain) == models.positions(again)


def test_what_a_bias_takes_is_counted_saved_and_joined(llama, tmp_path):
    ids = models.prompt(N)
    cache = read(llama, kvtrim.Cache(llama, "snapkv", KEEP, **small("snapkv"), **BOTH), ids)
    plain = read(llama, kvtrim.Cache(llama, "snapkv", KEEP, **small("snapkv"), **REFIT), ids)
    slots = sum(store.keys.shape[0] for store in cache.session.state.stores())
    assert cache.held_bytes == plain.held_bytes + 4 * slots
    cache.save(tmp_path / "cache")
    again = kvtrim.load_cache(tmp_path / "cache", llama)
    token, at = torch.tensor([[7]]), torch.tensor([[N]])
    with torch.no_grad(), kvtrim.attach(llama):
        joined = join([cache, plain])
        two = llama(token.repeat(2, 1), past_key_values=joined, position_ids=at.repeat(2, 1))
        for row, one in enumerate((again, plain)):
            alone = llama(token, past_key_values=one, position_ids=at).logits[0]
            torch.testing.assert_close(two.logits[row], alone, rtol=1e-8, atol=1e-8)


def test_a_budget_in_bytes_pays_for_biases(llama):
    ids, settings = models.prompt(N), small("snapkv")
    for size in range(8000, 20000, 900):
        for refit in (REFIT, BOTH):
            cache = kvtrim.Cache(llama, "snapkv", f"{size}B", **settings, **refit)
            held = read(llama, cache, ids).held_bytes
            assert (
                size - 6 * (2 * 8 * 8 + 8) < held <= size
            )  # an entry more in each head is too many


def test_a_prompt_that_fits_is_left_as_it_is(llama):
    ids = models.prompt(N)
    cache = read(llama, kvtrim.Cache(llama, "snapkv", N, **small("snapkv"), **BOTH), ids)
    full = read(llama, kvtrim.Cache(llama, "full", N), ids)
    for a, b in zip(heads_of(cache, "values"), heads_of(full, "values"), strict=True):
        assert all(torch.equal(own, other) for own, other in zip(a, b, strict=True))
    assert cache.held_bytes == full.held_bytes


def test_an_entry_that_goes_later_takes_its_bias_along(llama):
    ids = models.prompt(N + 6)
    settings = {**small("tova"), **BOTH}
    cache = read(llama, kvtrim.Cache(llama, "tova", KEEP, **settings), ids[:, :N])

    def entries():
        """For each head its positions, values and biases."""
        buffers = heads_of(cache, "values"), heads_of(cache, "bias")
        layers = zip(models.positions(cache), *buffers, strict=True)
        heads = (zip(*layer, strict=True) for layer in layers)
        return [(at, v.tolist(), b.tolist()) for layer in heads for at, v, b in layer]

    before = [dict(zip(at, zip(v, b, strict=True), strict=True)) for at, v, b in entries()]
    read(llama, cache, ids[:, N:], *[1] * 6)
    assert len(entries()[0][0]) == KEEP
    for known, (at, values, biases) in zip(before, entries(), strict=True):
        for position, value, bias in zip(at, values, biases, strict=True):
            assert position >= N or known[position] == (value, bias)


def test_what_cannot_go_together_is_refused(llama):
    for wrong in ({"chunks": True}, {"positions": "rolled"}):
        with pytest.raises(UsageError, match="refit"):
            kvtrim.Cache(llama, "snapkv", KEEP, prompt_tokens=N, **REFIT, **wrong)
    cache = read(
        llama, kvtrim.Cache(llama, "snapkv", KEEP, **small("snapkv"), **BOTH), models.prompt(N)
    )
    cache.session.impl = "varlen"
    with pytest.raises(UsageError, match="varlen"):
        read(llama, cache, torch.tensor([[5]]))
