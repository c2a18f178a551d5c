"""A cache made from one recorded prefill is the cache of a prefill of its own."""

import pytest
import torch

import kvtrim
import models
from kvtrim.bench.candidates import Candidate
from kvtrim.bench.eval.prefill import replayable
from kvtrim.errors import UsageError
from kvtrim.hf.replay import record
from kvtrim.methods.settings import find
from small import small


@pytest.fixture(scope="module")
def recorded():
    """A model and what it recorded once; no cache made from it changes it for the next."""
    model = models.tiny("llama")
    return model, record(model, models.prompt(48))


NARROWING = sorted(name for name in kvtrim.METHODS if find(name).propagation.narrows)


@pytest.mark.parametrize("name", sorted({*kvtrim.METHODS} - {*NARROWING}))
def test_a_replayed_cache_equals_its_own_prefill(recorded, name):
    model, recording = recorded
    own = kvtrim.Cache(model, name, 24, **small(name))
    with torch.no_grad(), kvtrim.attach(model):
        logits = model(models.prompt(48), past_key_values=own, logits_to_keep=1).logits[:, -1]
    assert torch.equal(recording.logits, logits)
    held, expected = own.held_bytes, go_on(model, own)
    for _ in range(2):
        replayed = recording.cache(name, 24, **small(name))
        assert replayed.held_bytes == held
        assert go_on(model, replayed).equal(expected)


@pytest.mark.parametrize("name", NARROWING)
def test_a_method_that_changes_the_prefill_is_refused(recorded, name):
    with pytest.raises(UsageError, match="one of its own"):
        recorded[1].cache(name, 24, **small(name))


def test_a_method_that_cuts_between_chunks_is_refused(llama):
    """Later chunks see what is left of earlier ones, which no pass over the whole prompt shows."""
    with pytest.raises(UsageError, match="one of its own"):
        record(llama, models.prompt(48)).cache("knorm", 24, chunks=True, prompt_tokens=48)


@pytest.mark.parametrize("name", sorted(kvtrim.METHODS))
def test_only_what_leaves_the_prefill_alone_shares_one(name):
    whole = Candidate(name, "24", small(name))
    assert replayable(whole) == (name not in NARROWING)
    try:
        find(name, chunks=True, **small(name))
    except UsageError:
        return
    assert not replayable(Candidate(name, "24", small(name) | {"chunks": True}))


def test_sliding_layers_are_replayed_too():
    model = models.tiny("gemma3_text")
    ids = models.prompt(48)
    recording = record(model, ids)
    own = kvtrim.Cache(model, "adakv", 24, window=8)
    with torch.no_grad(), kvtrim.attach(model):
        model(ids, past_key_values=own)
    expected = go_on(model, own)
    for _ in range(2):
        assert go_on(model, recording.cache("adakv", 24, window=8)).equal(expected)


def go_on(model, cache):
    token, logits = torch.tensor([[9]]), []
    with torch.no_grad(), kvtrim.attach(model):
        for _ in range(6):
            logits.append(model(token, past_key_values=cache).logits[:, -1])
            token = logits[-1].argmax(-1, keepdim=True)
    return torch.cat(logits)
