"""Evicting equals masking.

A model over the small cache gives the logits of the untouched model whose attention is masked to
the same entries. A method of the registry is covered by being in it.
"""

import pytest
import torch

import compositions
import kvtrim
import models
import oracles
from kvtrim.methods.settings import find
from small import WINDOW, small

METHODS = sorted(kvtrim.METHODS)
KEEP = 24


def restarts(name):
    """Positions are closed up, so that no mask of the whole prompt gives the same logits."""
    return find(name).propagation.restarts


def step_through(model, cache, ids, prompt):
    """Feed the prompt, then token by token.

    Logits of every pass, what each token could see, and what each layer read of the prompt.
    """
    logits, seen, read = [], [], {}

    def look(number, call):
        part = cache.session.narrowing
        read.setdefault(number, list(range(prompt)) if part is None else part.columns[0].tolist())

    cache.session._tap = look
    with torch.no_grad(), kvtrim.attach(model):
        logits.append(model(ids[:, :prompt], past_key_values=cache).logits)
        for at in range(prompt, ids.shape[1]):
            before = models.positions(cache)
            logits.append(model(ids[:, at : at + 1], past_key_values=cache).logits)
            after = models.positions(cache)
            source = after if cache.method.schedule.ahead else before
            seen.append([[{*head, at} for head in layer] for layer in source])
    return torch.cat(logits, dim=1), seen, read


def masks_of(model, cache, seen, read, n, prompt):
    """The mask of each layer of the model: what `step_through` saw, or the layer's own window."""
    config, masks = model.config, {}
    for layer in range(config.num_hidden_layers):
        if layer not in cache.managed:
            masks[layer] = oracles.causal(n, models.WINDOW)
            continue
        number = cache.managed.index(layer)
        heads = config.num_attention_heads
        mask = oracles.causal(n).repeat(heads, 1, 1)
        mask[:, :prompt, [at for at in range(prompt) if at not in read[number]]] = False
        for step, layers in enumerate(seen):
            group = heads // len(layers[number])
            for head in range(heads):
                mask[head, prompt + step] = False
                mask[head, prompt + step, list(layers[number][head // group])] = True
        masks[layer] = mask
    return masks


@pytest.mark.parametrize("name", [n for n in METHODS if not restarts(n)])
def test_evicting_equals_masking(llama, name):
    ids, prompt = models.prompt(56), 48
    cache = kvtrim.Cache(llama, name, KEEP, **small(name))
    logits, seen, read = step_through(llama, cache, ids, prompt)
    expected = oracles.run_masked(llama, ids, masks_of(llama, cache, seen, read, 56, prompt))
    through = [*read[len(read) - 1], *range(prompt, 56)]
    torch.testing.assert_close(logits, expected[:, through], rtol=1e-8, atol=1e-8)
    held = sum(len(head) for layer in models.positions(cache) for head in layer)
    if name != "full":
        assert held < 56 * 2 * 3, "nothing was evicted, so nothing was proven"


@pytest.mark.parametrize("name", ["full", "snapkv", "adakv", "h2o"])
def test_evicting_equals_masking_on_every_architecture(any_model, name):
    ids, prompt = models.prompt(56, seed=1), 48
    cache = kvtrim.Cache(any_model, name, KEEP, **small(name))
    with compositions.exact():
        logits, seen, read = step_through(any_model, cache, ids, prompt)
        masks = masks_of(any_model, cache, seen, read, 56, prompt)
        expected = oracles.run_masked(any_model, ids, masks)
    torch.testing.assert_close(logits, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("preset", ["upstream", "kvf", "kvpress"])
def test_query_head_presets_equal_masking_per_query_head(llama, preset):
    ids, prompt = models.prompt(56, seed=2), 48
    cache = kvtrim.Cache(llama, "adakv", KEEP, preset=preset, window=WINDOW)
    logits, seen, read = step_through(llama, cache, ids, prompt)
    expected = oracles.run_masked(llama, ids, masks_of(llama, cache, seen, read, 56, prompt))
    torch.testing.assert_close(logits, expected, rtol=1e-8, atol=1e-8)
    assert len(seen[0][0]) == (2 if preset == "kvpress" else 6)


@pytest.mark.parametrize("name", METHODS)
def test_a_budget_as_long_as_the_text_changes_no_bit(llama, name):
    ids = models.prompt(60)
    with torch.no_grad():
        llama.set_attn_implementation("sdpa")
        expected = llama(ids[:, :48]).logits
        cache = kvtrim.Cache(llama, name, 60, **small(name))
        with kvtrim.attach(llama):
            logits = llama(ids[:, :48], past_key_values=cache).logits
        assert torch.equal(logits, expected)
        assert all(bool((counts == 48).all()) for counts in cache.entries())


@pytest.mark.parametrize("name", METHODS)
def test_a_second_turn_sees_what_was_kept_and_all_of_its_own(llama, name):
    ids, prompt = models.prompt(60, seed=3), 40
    settings = small(name)
    whole = kvtrim.Cache(llama, name, KEEP, **settings)
    single = kvtrim.Cache(llama, name, KEEP, **settings)
    with torch.no_grad(), kvtrim.attach(llama):
        llama(ids[:, :prompt], past_key_values=whole)
        llama(ids[:, :prompt], past_key_values=single)
        if whole.method.schedule.every is not None:
            pytest.skip("evicts inside the turn, so one pass and many differ by design")
        turn = llama(ids[:, prompt:], past_key_values=whole).logits
        steps = [
            llama(ids[:, at : at + 1], past_key_values=single).logits for at in range(prompt, 60)
        ]
    torch.testing.assert_close(turn, torch.cat(steps, dim=1), rtol=1e-8, atol=1e-8)
    assert models.positions(whole) == models.positions(single)
