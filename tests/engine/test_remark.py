"""A method that holds clearly more or less than it was asked for says so, once."""

import warnings

import pytest
import torch

import kvtrim
import models
from kvtrim.bench.candidates import Candidate
from kvtrim.bench.eval.prefill import replayable
from kvtrim.hf.replay import record
from small import small

PROMPT = 200


@pytest.fixture(scope="module")
def recorded():
    """A model, and one reading of the prompt for all methods that leave the pass alone."""
    model = models.tiny("llama")
    return model, record(model, models.prompt(PROMPT))


def read(model, name, keep, recording=None, **settings):
    own = {key: value for key, value in small(name).items() if key not in ("tokens", "decay")}
    if recording is not None and replayable(Candidate(name, str(keep), own | settings)):
        return recording.cache(name, keep, **own | settings)
    cache = kvtrim.Cache(model, name, keep, **own | settings)
    with torch.no_grad(), kvtrim.attach(model):
        model(models.prompt(PROMPT), past_key_values=cache)
    return cache


def presets():
    for name, method in sorted(kvtrim.METHODS.items()):
        yield name, {}
        yield from ((name, {"preset": preset}) for preset in method.presets)


@pytest.mark.parametrize("keep", [0.4, "40KiB"])
def test_whatever_holds_clearly_more_or_less_than_asked_says_so(recorded, keep):
    """By the entries counted in the stores, for every method and preset of the registry."""
    spoke = set()
    for name, settings in presets():
        try:
            cache = read(recorded[0], name, keep, recorded[1], **settings)
        except kvtrim.KvtrimError:
            continue
        mean = torch.stack([counts.double().sum() / 2 for counts in cache.entries()]).mean()
        asked = 80.0
        if keep == "40KiB":  # of every head that stores entries
            heads = cache.entries()[0].shape[1]
            stores = cache.session.state.stores()
            remembered = cache.held_bytes - sum(store.nbytes for store in stores)
            column = 4 if "carried" in stores[0].buffers else 0
            entry = 3 * heads * (2 * 8 * 8 + 4 + column)
            asked = (40 * 1024 - remembered) / entry * heads / 2
        off = abs(float(mean) - asked) > max(1, 0.05 * asked)
        if name == "full":
            assert cache.remark is None
            continue
        assert (cache.remark is not None) == off, (name, settings, float(mean), cache.remark)
        if cache.remark is not None:
            assert f"{float(mean):,.0f} are held: " in cache.remark, (name, settings)
            spoke.add(name)
    assert {"fastkv", "knorm"} <= spoke
    assert ("snapkv" in spoke) == (keep != "40KiB"), "bytes are obeyed by query heads too"


def test_a_prompt_within_its_budget_needs_no_remark(llama):
    for keep in (PROMPT, 2 * PROMPT, 1.0):
        assert read(llama, "fastkv", keep).remark is None
        assert read(llama, "shotkv", keep).remark is None


def test_window_and_sinks_that_take_more_than_a_share_are_named(llama):
    remark = read(llama, "snapkv", 0.1, window=32).remark
    assert remark == (
        "keep=10% asks for 20 of 200 entries per KV head, 33 are held: "
        "window and sinks alone are 32"
    )


def test_of_a_batch_the_prompt_that_is_furthest_off_is_named(llama):
    ids, mask = models.prompt(PROMPT, rows=2), torch.ones(2, PROMPT, dtype=torch.long)
    mask[0, : PROMPT - 60] = 0
    cache = kvtrim.Cache(llama, "snapkv", 0.2, window=32)
    with torch.no_grad(), kvtrim.attach(llama):
        llama(ids, attention_mask=mask, past_key_values=cache)
    assert cache.remark is not None and "asks for 12 of 60" in cache.remark
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.remark is None, "the other prompt has room for its window"


def test_a_prompt_that_is_padding_alone_asks_for_nothing(llama):
    ids, mask = models.prompt(40, rows=2), torch.ones(2, 40, dtype=torch.long)
    mask[1] = 0
    for name, every in (("shotkv", None), ("snapkv", 4)):
        own = small(name) | ({} if every is None else {"every": every})
        for padding in (mask, mask * 0):
            cache = kvtrim.Cache(llama, name, 10, **own)
            with torch.no_grad(), kvtrim.attach(llama), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                llama(ids, attention_mask=padding, past_key_values=cache)
                llama(ids[:, :1], past_key_values=cache)
            assert "None" not in str(cache.remark or "") and cache.seen == 41


def test_it_is_known_once_the_prompt_is_complete_and_stays(llama, tmp_path):
    ids, cache = models.prompt(PROMPT), kvtrim.Cache(llama, "knorm", 40, preset="kvf")
    assert cache.remark is None
    with torch.no_grad(), kvtrim.attach(llama):
        llama(ids, past_key_values=cache)
        said = cache.remark
        assert said is not None and "everything stays in skip_layers=0, 1" in said
        llama(ids[:, :30], past_key_values=cache)
    assert cache.remark == said, "later turns are no part of the prompt"
    cache.save(tmp_path / "cache.kv")
    assert kvtrim.load_cache(tmp_path / "cache.kv", llama).remark == said


def test_answers_carry_it_once(llama):
    text, settings = "the tide turns at noon. " * 12, {"method": "snapkv", "preset": "upstream"}
    given = {"keep": 100, "max_new_tokens": 2, "window": 8, **settings}
    result = kvtrim.generate(llama, models.tokenizer(), text, ["when?", "why?"], **given)
    assert result.remark is not None and "3 per KV head" in result.remark
    assert {answer.remark for answer in result.answers} == {result.remark}
    aware = kvtrim.generate(llama, models.tokenizer(), text, "when?", **given)
    assert aware.remark is not None and "300 are held" in aware.remark
    plain = {"method": "snapkv", "keep": 100, "window": 8}
    assert kvtrim.generate(llama, models.tokenizer(), text, **plain).remark is None
