"""What comes after the prompt, or in parts of it: budgets hold, or it is said once."""

import warnings

import pytest
import torch
from transformers import GenerationConfig

import kvtrim
import models
from kvtrim.errors import UsageError
from kvtrim.hf.base import cache_keyword
from kvtrim.hf.generate import read
from small import small

ASKED = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


def cache_for(model, **options):
    return kvtrim.Cache(model, "snapkv", 24, window=8, **options)


@pytest.mark.parametrize("chunk", [16, 40, 100])
def test_chunks_of_generate_are_told_apart_from_prompts(llama, chunk):
    ids = models.prompt(60)
    with kvtrim.attach(llama):
        once, parts = cache_for(llama), cache_for(llama)
        expected = llama.generate(ids, past_key_values=once, **ASKED)
        found = llama.generate(ids, past_key_values=parts, prefill_chunk_size=chunk, **ASKED)
    assert torch.equal(found, expected)
    assert models.positions(parts) == models.positions(once)


def test_what_later_passes_add_beyond_the_budget_is_said_once(llama):
    with kvtrim.attach(llama):
        cache = cache_for(llama)
        read(llama, models.prompt(40), cache, 20)
        with pytest.warns(UserWarning, match=r"prompt_tokens=LENGTH.*every=64"):
            read(llama, models.prompt(10), cache)
        read(llama, models.prompt(10), cache)


def by_generate(model, cache, history, turn):
    history = torch.cat([history, turn], dim=1)
    return model.generate(history, past_key_values=cache, **ASKED)


def by_hand(model, cache, history, turn):
    with torch.no_grad():
        model(turn, past_key_values=cache)
        new = models.prompt(4, rows=len(turn))
        for at in range(4):
            model(new[:, at : at + 1], past_key_values=cache)
    return torch.cat([history, turn, new], dim=1)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("go_on", [by_generate, by_hand])
def test_turns_are_told_of_with_the_answers_before_them_however_they_come(llama, go_on, rows):
    cache = cache_for(llama)
    history = models.prompt(0, rows=rows)
    with kvtrim.attach(llama), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        lengths = []
        for number in range(5):
            turn = models.prompt(5 if number else 40, rows=rows, seed=number)
            history = go_on(llama, cache, history, turn)
            lengths.append(sum("applied to the prompt" in str(each.message) for each in said))
    assert lengths == [0, 0, 0, 1, 1]  # 27 tokens since the prompt, of which 15 are turns'
    assert all(int(entries.max()) > 24 for entries in cache.entries())


def test_what_was_taken_back_is_not_told_of(llama):
    cache = cache_for(llama)
    with kvtrim.attach(llama), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        llama(models.prompt(40), **cache_keyword(cache))
        for seed in range(6):
            llama(models.prompt(10, seed=seed), **cache_keyword(cache))
            cache.crop(-10)


@pytest.mark.parametrize("name", sorted(set(kvtrim.METHODS) - {"full"}))
def test_the_remedy_is_one_that_the_method_accepts(llama, name):
    cache = kvtrim.Cache(llama, name, 24, **small(name))
    with kvtrim.attach(llama), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        read(llama, models.prompt(40), cache)
        read(llama, models.prompt(26), cache)
    texts = [str(each.message) for each in said if "applied to the prompt" in str(each.message)]
    if cache.method.schedule.every is not None:
        assert not texts
    elif "pass every=64" in texts[0]:
        kvtrim.Cache(llama, name, 24, every=64, **small(name))
    else:
        with pytest.raises(UsageError):
            kvtrim.Cache(llama, name, 24, every=64, **small(name))
        assert "a new cache" in texts[0]


@pytest.mark.parametrize("options", [{"prompt_tokens": 50}, {"every": 4}, {"expected": 50}])
def test_the_remedies_hold_the_budget_and_nothing_is_said(llama, options):
    expected = options.get("expected")
    cache = cache_for(llama, **({} if expected else options))
    if expected:
        cache.expect(expected)
    with kvtrim.attach(llama), warnings.catch_warnings():
        warnings.simplefilter("error")
        read(llama, models.prompt(50), cache, 10)
    assert expected or int(cache.entries()[0].max()) <= 24


def ask(**options):
    model = models.tiny("llama")
    settings = {"method": "snapkv", "keep": 24, "window": 8, **options}
    return kvtrim.generate(model, models.tokenizer(), "a text " * 6, "who?", **settings)


def test_a_generation_config_is_obeyed():
    config = GenerationConfig(do_sample=True, temperature=5.0, top_k=0, max_new_tokens=5)
    torch.manual_seed(3)
    there = ask(generation_config=config)
    torch.manual_seed(3)
    here = ask(do_sample=True, temperature=5.0, top_k=0, max_new_tokens=5)
    greedy = ask(max_new_tokens=5)
    assert there.answers[0].token_ids == here.answers[0].token_ids
    assert there.answers[0].token_ids != greedy.answers[0].token_ids
    quiet = ask(generation_config=GenerationConfig(max_new_tokens=5))
    assert quiet.answers[0].token_ids == greedy.answers[0].token_ids
    beams = ask(generation_config=GenerationConfig(num_beams=2, max_new_tokens=4))
    assert beams.answers[0].token_ids == ask(num_beams=2, max_new_tokens=4).answers[0].token_ids


def test_stop_strings_need_no_second_tokenizer():
    letter = next(each for each in ask(max_new_tokens=8).text if each.isascii())
    for options in (
        {"stop_strings": [letter]},
        {"generation_config": GenerationConfig(stop_strings=[letter])},
    ):
        assert len(ask(max_new_tokens=8, **options).answers[0].token_ids) < 8


@pytest.mark.parametrize(
    "option",
    [
        {"return_dict_in_generate": True},
        {"output_scores": True},
        {"max_length": 40},
        {"prefill_chunk_size": 8},
        {"num_return_sequences": 2, "do_sample": True},
        {"use_cache": False},
        {"cache_implementation": "static"},
    ],
)
def test_what_cannot_be_obeyed_is_refused_by_name_wherever_it_stands(option):
    name = next(iter(option))
    with pytest.raises(UsageError, match=name):
        ask(**option)
    with pytest.raises(UsageError, match=name):
        ask(generation_config=GenerationConfig(**option))
