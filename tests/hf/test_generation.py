"""kvtrim.Cache inside transformers' own generate: every mode, padded batches, turns, chunks."""

import functools

import pytest
import torch
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList, TextStreamer

import kvtrim
import models
from kvtrim.errors import UsageError
from kvtrim.hf.generate import read
from small import small

METHODS = sorted(kvtrim.METHODS)
NEW = 6
KINDS = ["full", "snapkv", "cake", "fastkv", "h2o", "headkv", "kvzip", "shotkv", "tova"]
"""One method for each kind of state that a cache keeps between passes."""


def cache_for(model, name, keep=24, **options):
    return kvtrim.Cache(model, name, keep, **small(name), **options)


def generate(model, ids, cache, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None} | options
    with kvtrim.attach(model):
        return model.generate(ids, attention_mask=mask, past_key_values=cache, **options)


@functools.cache
def alone(name, length):
    """A prompt under a method: its whole text after `generate`, and what is held of it."""
    own = cache_for(_shared(), name)
    return generate(_shared(), models.prompt(length, seed=length), own)[0], models.positions(own)


@functools.cache
def _shared():
    return models.tiny("llama")


def greedy_by_hand(model, ids, cache):
    with torch.no_grad(), kvtrim.attach(model):
        out = model(ids, past_key_values=cache).logits
        tokens = [out[0, -1].argmax()]
        for _ in range(NEW - 1):
            out = model(tokens[-1].view(1, 1), past_key_values=cache).logits
            tokens.append(out[0, -1].argmax())
    return torch.stack(tokens)


@pytest.mark.parametrize("name", METHODS)
def test_generate_equals_a_loop_by_hand(llama, name):
    ids = models.prompt(48, seed=48)
    text, _ = alone(name, 48)
    assert torch.equal(text[48:], greedy_by_hand(llama, ids, cache_for(llama, name)))


def test_the_full_method_generates_what_transformers_generates(any_model):
    ids = models.prompt(40)
    expected = any_model.generate(
        ids,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        attention_mask=torch.ones_like(ids),
    )
    assert torch.equal(generate(any_model, ids, cache_for(any_model, "full")), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"repetition_penalty": 1.3},
    ],
    ids=["sampling", "beams", "beams-two", "samples", "penalty"],
)
def test_every_decoding_mode_equals_the_full_cache_when_nothing_is_evicted(llama, options):
    ids = models.prompt(30)
    torch.manual_seed(7)
    expected = generate(llama, ids, DynamicCache(config=llama.config), **options)
    for name in ("full", "snapkv", "adakv"):
        torch.manual_seed(7)
        assert torch.equal(
            generate(llama, ids, cache_for(llama, name, keep=200), **options), expected
        )


def test_beam_search_reorders_what_was_kept(llama):
    """Beams over a small cache equal beams over the full cache of the kept entries alone."""
    ids = models.prompt(48)
    out = generate(
        llama, ids, cache_for(llama, "adakv"), num_beams=3, return_dict_in_generate=True
    )
    again = generate(llama, ids, cache_for(llama, "adakv"), num_beams=3)
    assert torch.equal(out.sequences, again)
    reference = generate(llama, ids, cache_for(llama, "adakv", impl="reference"), num_beams=3)
    assert torch.equal(out.sequences, reference)


def test_streamers_and_stopping_criteria_work(llama, capsys):
    class AfterFive(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            done = input_ids.shape[1] >= 48 + 5
            return torch.full((input_ids.shape[0],), done)

    ids = models.prompt(48)
    streamer = TextStreamer(models.tokenizer(), skip_prompt=True)
    out = generate(
        llama,
        ids,
        cache_for(llama, "snapkv"),
        streamer=streamer,
        stopping_criteria=StoppingCriteriaList([AfterFive()]),
    )
    assert out.shape[1] == 53
    assert capsys.readouterr().out.strip()


def padded(rows):
    """Left-padded ids and mask of prompts of different lengths."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = row
        mask[i, longest - len(row) :] = 1
    return ids, mask


@pytest.mark.parametrize("name", METHODS)
def test_a_padded_batch_equals_its_prompts_alone(llama, name):
    ids, mask = padded([models.prompt(n, seed=n)[0] for n in (33, 48)])
    batch = cache_for(llama, name)
    out = generate(llama, ids, batch, mask)
    for row, length in enumerate((33, 48)):
        text, held = alone(name, length)
        assert torch.equal(out[row, 48:], text[length:])
        assert models.positions(batch, row) == held


@pytest.mark.parametrize("architecture", ["gemma3_text", "gemma2", "phi3"])
def test_a_padded_batch_equals_its_prompts_alone_on_other_architectures(architecture):
    model = models.tiny(architecture)
    prompts = [models.prompt(n, seed=n)[0] for n in (48, 30)]
    ids, mask = padded(prompts)
    out = generate(model, ids, cache_for(model, "adakv"), mask)
    for row, own in enumerate(prompts):
        expected = generate(model, own[None], cache_for(model, "adakv"))
        assert torch.equal(out[row, ids.shape[1] :], expected[0, len(own) :])


@pytest.mark.parametrize("name", METHODS)
def test_an_unpadded_batch_equals_its_prompts_alone(llama, name):
    other = models.prompt(48, seed=49)
    batch, own = cache_for(llama, name), cache_for(llama, name)
    out = generate(llama, torch.cat([models.prompt(48, seed=48), other]), batch)
    text, held = alone(name, 48)
    assert torch.equal(out[0], text) and models.positions(batch, 0) == held
    assert torch.equal(out[1], generate(llama, other, own)[0])
    assert models.positions(batch, 1) == models.positions(own)


@pytest.mark.parametrize("name", KINDS)
def test_a_second_turn_through_generate_reads_only_what_is_new(llama, name):
    first = models.prompt(40)
    cache = cache_for(llama, name)
    answer = generate(llama, first, cache)
    history = torch.cat([answer, models.prompt(9, seed=5)], dim=1)
    out = generate(llama, history, cache)
    assert cache.seen == out.shape[1] - 1
    by_hand = cache_for(llama, name)
    generate(llama, first, by_hand)
    with torch.no_grad(), kvtrim.attach(llama):
        logits = llama(history[:, by_hand.seen :], past_key_values=by_hand).logits
    assert out[0, history.shape[1]] == logits[0, -1].argmax()


def test_a_second_turn_of_a_batch_whose_answers_ended_at_different_times(llama):
    """Padding behind a finished answer is taken back when the next turn's mask hides it."""
    ids, mask = padded([models.prompt(n, seed=n)[0] for n in (40, 33)])
    cache = cache_for(llama, "snapkv")
    generate(llama, ids, cache, mask, max_new_tokens=6)
    columns = cache.seen
    turn = models.prompt(7, seed=8, rows=2)
    now = torch.cat([mask, torch.ones(2, columns - 40, dtype=torch.long)], dim=1)
    now[1, -3:] = 0  # the second answer had ended three tokens earlier
    now = torch.cat([now, torch.ones_like(turn)], dim=1)
    where = (now.cumsum(-1) - 1)[:, columns:]
    with torch.no_grad(), kvtrim.attach(llama):
        logits = llama(turn, attention_mask=now, position_ids=where, past_key_values=cache).logits

        alone = cache_for(llama, "snapkv")
        own = ids[1:2, 7:]
        text = generate(llama, own, alone, max_new_tokens=6)
        alone.crop(-3)
        expected = llama(turn[1:], past_key_values=alone).logits
    assert text.shape[1] == 39
    torch.testing.assert_close(logits[1:], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "chunk"), [*((name, 7) for name in METHODS), *((name, 16) for name in KINDS)]
)
def test_reading_in_chunks_keeps_the_same_entries(llama, name, chunk):
    ids = models.prompt(48)
    once = cache_for(llama, name)
    parts = cache_for(llama, name, prompt_tokens=48)
    with kvtrim.attach(llama):
        if once.method.propagation.narrows:
            with pytest.raises(UsageError, match="one pass"):
                read(llama, ids, parts, chunk)
            assert parts.seen == 0
            return
        read(llama, ids, once)
        read(llama, ids, parts, chunk)
    assert models.positions(parts) == models.positions(once)
    longer = torch.cat([ids, models.prompt(3, seed=1)], dim=1)
    assert torch.equal(generate(llama, longer, parts), generate(llama, longer, once))


def test_reading_a_padded_batch_in_chunks(llama):
    ids, mask = padded([models.prompt(n, seed=n)[0] for n in (48, 20, 41)])
    once, parts = cache_for(llama, "snapkv"), cache_for(llama, "snapkv", prompt_tokens=48)
    where = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), kvtrim.attach(llama):
        llama(ids, attention_mask=mask, position_ids=where, past_key_values=once)
        for at in range(0, 48, 16):
            part = slice(at, at + 16)
            llama(
                ids[:, part],
                attention_mask=mask[:, : at + 16],
                position_ids=where[:, part],
                past_key_values=parts,
            )
    for row in range(3):
        assert models.positions(parts, row) == models.positions(once, row)


def test_transformers_own_chunked_prefill_works_when_the_prompt_length_is_known(llama):
    ids = models.prompt(48)
    cache = cache_for(llama, "snapkv", prompt_tokens=48)
    out = generate(llama, ids, cache, prefill_chunk_size=16)
    assert torch.equal(out, generate(llama, ids, cache_for(llama, "snapkv")))


@pytest.mark.parametrize("name", KINDS)
def test_two_interleaved_conversations_equal_two_separate_ones(llama, name):
    texts = [models.prompt(40, seed=1), models.prompt(44, seed=2)]
    apart = [greedy_by_hand(llama, ids, cache_for(llama, name)) for ids in texts]
    caches = [cache_for(llama, name) for _ in texts]
    tokens = [[], []]
    with torch.no_grad(), kvtrim.attach(llama):
        last = [
            llama(ids, past_key_values=cache).logits[:, -1].argmax(-1)
            for ids, cache in zip(texts, caches, strict=True)
        ]
        for _ in range(NEW):
            for i in (0, 1):
                tokens[i].append(last[i])
                out = llama(last[i][:, None], past_key_values=caches[i]).logits
                last[i] = out[:, -1].argmax(-1)
    for i in (0, 1):
        assert torch.equal(torch.cat(tokens[i]), apart[i])


def test_entries_are_written_in_and_out_of_inference_mode(llama):
    ids = models.prompt(40)
    cache = cache_for(llama, "adakv")
    with kvtrim.attach(llama):
        with torch.inference_mode():
            llama(ids, past_key_values=cache)
        with torch.no_grad():
            llama(ids[:, :1], past_key_values=cache)
        with torch.inference_mode():
            llama(ids[:, :1], past_key_values=cache)
    assert cache.seen == 42


def test_assisted_decoding_crops_the_cache_of_a_method_that_only_appends(llama):
    ids = models.prompt(30)
    expected = generate(llama, ids, cache_for(llama, "snapkv", keep=200))
    out = generate(llama, ids, cache_for(llama, "snapkv", keep=200), prompt_lookup_num_tokens=3)
    assert torch.equal(out, expected)
