"""A prompt read in chunks and cut back after each of them."""

import pytest
import torch

import kvtrim
import models
import oracles
from kvtrim.errors import UsageError
from kvtrim.hf.generate import read
from kvtrim.methods.settings import find
from small import small

PROMPT, CHUNK, KEEP = 64, 16, 24


def chunkable(name):
    try:
        return bool(find(name, chunks=True))
    except UsageError:
        return False


METHODS = sorted(name for name in kvtrim.METHODS if chunkable(name))


def cache_for(model, name, keep=KEEP, prompt=PROMPT, **settings):
    own = {**small(name), "chunks": True, **settings}
    return kvtrim.Cache(model, name, keep, prompt_tokens=prompt, **own)


def test_methods_that_score_a_chunk_at_sight_accept_it():
    assert {"snapkv", "knorm", "keydiff", "curdkv", "adakv", "h2o", "tova"} <= {*METHODS}
    assert {"kvzip", "laprox", "fastkv", "shotkv", "chunkkv"}.isdisjoint(METHODS)


@pytest.mark.parametrize("name", ["kvzip", "laprox", "lava", "fastkv", "shotkv", "chunkkv"])
def test_methods_that_need_the_whole_prompt_say_so(name):
    with pytest.raises(
        UsageError, match=r"needs all of it: leave chunks out|keeps whole parts of the prompt"
    ):
        find(name, chunks=True)


@pytest.mark.parametrize("name", METHODS)
def test_no_layer_ever_holds_more_than_budget_and_chunk(llama, name):
    cache, most = cache_for(llama, name), []
    attend = cache.session.attend

    def watched(index, call):
        out = attend(index, call)
        most.append(max(int(store.length.max()) for store in cache.session.state.stores()))
        return out

    cache.session.attend = watched
    with kvtrim.attach(llama):
        read(llama, models.prompt(PROMPT), cache, CHUNK)
    if name == "full":
        assert max(most) == PROMPT
        return
    mean = torch.cat([counts.flatten() for counts in cache.entries()]).double().mean()
    assert mean <= KEEP + 3
    assert max(most) <= PROMPT - CHUNK + KEEP, "an early layer was never cut"


@pytest.mark.parametrize("name", METHODS)
def test_evicting_between_chunks_equals_masking(llama, name):
    ids = models.prompt(PROMPT, seed=4)
    cache, heads = cache_for(llama, name), 6
    masks = {layer: oracles.causal(PROMPT).repeat(heads, 1, 1) for layer in range(3)}
    logits = []
    with torch.no_grad(), kvtrim.attach(llama):
        for start in range(0, PROMPT, CHUNK):
            held = models.positions(cache)
            logits.append(llama(ids[:, start : start + CHUNK], past_key_values=cache).logits)
            for layer, own in enumerate(held):
                for head in range(heads):
                    gone = {*range(start)} - {*own[head // (heads // len(own))]}
                    masks[layer][head, start : start + CHUNK, sorted(gone)] = False
    expected = oracles.run_masked(llama, ids, masks)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", METHODS)
def test_one_chunk_as_long_as_the_prompt_is_the_ordinary_prefill(llama, name):
    ids = models.prompt(PROMPT)
    once, chunked = cache_for(llama, name, chunks=False), cache_for(llama, name)
    with kvtrim.attach(llama):
        read(llama, ids, once)
        read(llama, ids, chunked, PROMPT)
    assert models.positions(once) == models.positions(chunked)


def test_a_share_is_a_share_of_the_whole_prompt(llama):
    cache = cache_for(llama, "knorm", keep=0.5)
    with kvtrim.attach(llama):
        for start in range(0, PROMPT, CHUNK):
            read(llama, models.prompt(PROMPT)[:, start : start + CHUNK], cache)
            assert int(cache.entries()[0][0, 0]) == min(start + CHUNK, PROMPT // 2)


def test_a_padded_batch_in_chunks_equals_its_prompts_alone(llama):
    """The short prompt begins in the second chunk."""
    rows = [models.prompt(n, seed=n)[0] for n in (PROMPT, PROMPT - CHUNK)]
    ids, mask = torch.zeros(2, PROMPT, dtype=torch.long), torch.zeros(2, PROMPT, dtype=torch.long)
    for row, own in enumerate(rows):
        ids[row, PROMPT - len(own) :], mask[row, PROMPT - len(own) :] = own, 1
    where = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = cache_for(llama, "snapkv")
    with torch.no_grad(), kvtrim.attach(llama):
        for at in range(0, PROMPT, CHUNK):
            part = slice(at, at + CHUNK)
            llama(
                ids[:, part],
                attention_mask=mask[:, : at + CHUNK],
                position_ids=where[:, part],
                past_key_values=batch,
            )
        for row, own in enumerate(rows):
            alone = cache_for(llama, "snapkv", prompt=len(own))
            read(llama, own[None], alone, CHUNK)
            assert models.positions(batch, row) == models.positions(alone)


def test_a_long_document_is_compressed_in_chunks(llama):
    tokenizer, context = models.tokenizer(), "the tide turns at noon and again at night. " * 8
    settings = {"method": "snapkv", "keep": 40, "window": 8, "prefill_chunk": 48}
    bounded = kvtrim.compress(llama, tokenizer, context, chunks=True, **settings)
    whole = kvtrim.compress(llama, tokenizer, context, **settings)
    assert bounded.seen == whole.seen > 300
    assert all(bool((counts == 40).all()) for counts in bounded.entries())
    assert models.positions(bounded) != models.positions(whole)


def test_chunks_without_the_length_of_the_prompt_are_refused(llama):
    with pytest.raises(UsageError, match="prompt_tokens"):
        kvtrim.Cache(llama, "snapkv", 40, chunks=True)


def test_a_prompt_with_named_parts_that_is_probed_may_come_in_chunks(llama):
    tokenizer, context = models.tokenizer(), "the tide turns at noon and again at night. " * 4
    parts = kvtrim.compress(llama, tokenizer, context, method="kvzip", keep=40, prefill_chunk=48)
    whole = kvtrim.compress(llama, tokenizer, context, method="kvzip", keep=40)
    assert models.positions(parts) == models.positions(whole)
