"""What comes after the prompt, or in parts of it: budgets hold, or it is said once."""

import warnings

import pytest
import torch
from transformers import GenerationConfig

import kvtrim
import models
from kvtrim.errors import UsageError
from kvtrim.hf.generate import read

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
