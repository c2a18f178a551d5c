"""Captured steps give the tokens of transformers' own loop. Without a GPU the same steps run
interpreted and are not captured."""

import time

import pytest
import torch
from transformers import GenerationConfig

import kvtrim
import models
from kvtrim.engine.graph import Stepper, Steps
from kvtrim.hf.decode import open_stepper
from kvtrim.hf.generate import generate
from small import small

pytest.importorskip("triton", reason="Triton is not installed (pip install 'kvtrim[triton]')")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPL = "auto" if DEVICE == "cuda" else "triton"
STEPPED = "captured" if DEVICE == "cuda" else "plain: interpreted on a CPU"
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4}
NEW = 8  # the fewest that are captured
METHODS = ["full", "adakv", "gemfilter"]


@pytest.fixture(scope="module")
def model():
    """Small: interpreted programs take their time, one for each head."""
    return models.tiny("llama", dtype=torch.float32, **SIZES).to(DEVICE)


def cache_of(model, method="adakv", impl=IMPL, keep=20, **settings):
    return kvtrim.Cache(model, method, keep, impl=impl, **small(method, 2, 4), **settings)


def prompt(rows=1, tokens=60):
    draw = torch.Generator().manual_seed(3)
    return torch.randint(4, 250, (rows, tokens), generator=draw).to(DEVICE)


def answered(model, cache, ids=None, **options):
    with kvtrim.attach(model):
        return generate(model, prompt() if ids is None else ids, cache, **options)


@pytest.mark.parametrize("method", METHODS)
def test_the_tokens_are_those_of_the_plain_loop(model, method):
    captured, plain = cache_of(model, method), cache_of(model, method, impl="sdpa")
    got = answered(model, captured, max_new_tokens=NEW)
    want = answered(model, plain, max_new_tokens=NEW)
    assert got.decoding == STEPPED != want.decoding and want.decoding.startswith("plain: ")
    assert got.token_ids == want.token_ids
    assert captured.seen == plain.seen == 60 + len(want.token_ids) - 1
    for mine, theirs in zip(captured.entries(), plain.entries(), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(captured.token_ids, plain.token_ids)
    for mine, theirs in zip(models.positions(captured), models.positions(plain), strict=True):
        assert mine == theirs


def test_sampled_tokens_are_those_of_the_plain_loop(model):
    options = {"max_new_tokens": NEW, "do_sample": True, "temperature": 1.5, "top_k": 40}
    found = []
    for impl in (IMPL, "sdpa"):
        torch.manual_seed(5)
        found.append(answered(model, cache_of(model, impl=impl), **options).token_ids)
    assert found[0] == found[1]


def test_a_padded_batch_equals_the_plain_loop(model):
    ids = prompt(rows=3, tokens=50)
    mask = torch.ones_like(ids)
    mask[0, :17] = 0
    mask[2, :40] = 0
    found = []
    for impl in (IMPL, "sdpa"):
        cache = cache_of(model, impl=impl)
        with kvtrim.attach(model):
            if impl == "sdpa":
                out = model.generate(
                    ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW,
                    do_sample=False, pad_token_id=0,
                )  # fmt: skip
            else:
                out = _stepped(model, cache, ids, mask, NEW)
        found.append(out)
    assert torch.equal(*found)


def _stepped(model, cache, ids, mask, count, room=None):
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        given = {"attention_mask": mask, "position_ids": place, "past_key_values": cache}
        token = model(ids, **given).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)
        with open_stepper(model, cache, room or count) as step:
            for _ in range(count - 1):
                token = step(token).argmax(-1, keepdim=True)
                ids = torch.cat([ids, token], dim=1)
    return ids


def test_a_conversation_goes_on_after_captured_steps(model):
    found = []
    for impl in (IMPL, "sdpa"):
        cache = cache_of(model, impl=impl)
        first = answered(model, cache, max_new_tokens=NEW).token_ids
        more = torch.cat([prompt(), torch.tensor([[*first, 7, 8, 9]], device=DEVICE)], dim=1)
        found.append(first + answered(model, cache, more, max_new_tokens=NEW).token_ids)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("method", "settings", "reason"),
    [
        ("h2o", {}, "evicts while tokens are generated"),
        ("streaming-llm", {"positions": "rolled"}, "turns the held keys"),
    ],
)
def test_what_cannot_be_captured_is_said_and_done_plainly(model, method, settings, reason):
    own = small(method, 2, 4) | settings
    cache = kvtrim.Cache(model, method, 20, impl=IMPL, **own)
    plain = kvtrim.Cache(model, method, 20, impl="sdpa", **own)
    got = answered(model, cache, max_new_tokens=NEW)
    assert reason in got.decoding
    assert got.token_ids == answered(model, plain, max_new_tokens=NEW).token_ids


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_new_tokens": 3}, "fewer than 8 new tokens"),
        ({"max_new_tokens": NEW, "num_beams": 2}, "num_beams asked for"),
    ],
)
def test_what_was_asked_for_can_rule_it_out(model, options, reason):
    assert reason in answered(model, cache_of(model, impl="sdpa"), **options).decoding


def test_beams_of_a_generation_config_rule_it_out(model):
    config = GenerationConfig(num_beams=2, eos_token_id=2, pad_token_id=0)
    got = answered(model, cache_of(model), max_new_tokens=NEW, generation_config=config)
    assert "beams" in got.decoding
    plain = answered(
        model, cache_of(model, impl="sdpa"), max_new_tokens=NEW, generation_config=config
    )
    assert got.token_ids == plain.token_ids


def test_room_for_tokens_that_never_came_is_given_back(model):
    captured, plain = cache_of(model), cache_of(model, impl="sdpa")
    ids, mask = prompt(), torch.ones_like(prompt())
    with kvtrim.attach(model):
        _stepped(model, captured, ids, mask, 3, room=400)
    answered(model, plain, max_new_tokens=3)
    assert captured.held_bytes <= 1.5 * plain.held_bytes


def test_layers_that_slide_rule_it_out():
    model = models.tiny("gemma3_text", dtype=torch.float32).to(DEVICE)
    cache = kvtrim.Cache(model, "snapkv", 20, **small("snapkv"))
    assert "slide" in answered(model, cache, max_new_tokens=NEW).decoding


def test_a_streamer_is_told_of_every_token(model):
    class Heard:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    heard = Heard()
    got = answered(model, cache_of(model), max_new_tokens=NEW, streamer=heard)
    assert got.decoding == STEPPED and heard.ended
    assert heard.tokens == prompt()[0].tolist() + got.token_ids


def test_room_is_bounded_and_an_interrupted_step_leaves_the_cache_whole(model):
    cache = cache_of(model)
    with kvtrim.attach(model), torch.no_grad():
        token = model(prompt(), past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        before = [counts.clone() for counts in cache.entries()]
        with pytest.raises(IndexError, match="room was reserved for 2"):
            with open_stepper(model, cache, 2) as step:
                for _ in range(3):
                    token = step(token).argmax(-1, keepdim=True)
        assert cache.seen == 62
        for mine, theirs in zip(cache.entries(), before, strict=True):
            assert torch.equal(mine, theirs + 2)
        model(token, past_key_values=cache)


def test_the_steps_reserve_all_room_at_once(model):
    cache = cache_of(model)
    with kvtrim.attach(model), torch.no_grad():
        model(prompt(), past_key_values=cache)
    steps = Steps(cache.session, 30)
    places = [store.keys.data_ptr() for store in steps.stores]
    stepper = Stepper(lambda ids, positions: torch.zeros(1, 3), steps)
    for _ in range(30):
        stepper(torch.zeros(1, 1, dtype=torch.int64))
    stepper.close()
    assert places == [store.keys.data_ptr() for store in steps.stores]
    assert cache.seen == 90 and not cache.session.lent


def test_tokens_of_one_pass_share_its_time(llama):
    ids, told = models.prompt(6).repeat(1, 8), []
    cache, start = kvtrim.Cache(llama, "full"), time.perf_counter()
    with kvtrim.attach(llama):
        done = generate(
            llama, ids, cache, 30, prompt_lookup_num_tokens=4, eos_token_id=None,
            progress=lambda *given: told.append(given),
        )  # fmt: skip
    passes = [count for what, count, _ in told if what == "answering"]
    assert passes[-1] == len(done.token_ids) == 30 and len(passes) < 29
    assert done.tpot_s * 29 < time.perf_counter() - start
