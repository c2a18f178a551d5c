"""One model, several users: threads, overlapping attachments, other caches, copies."""

import copy
import inspect
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache, StaticCache

import kvtrim
import models
from kvtrim.errors import CacheError, NotAttachedError, UsageError
from kvtrim.hf.base import Coming
from kvtrim.hf.generate import generate, read
from models import is_attached
from small import small

NEW = {"max_new_tokens": 4, "do_sample": False, "repetition_penalty": 1.5, "eos_token_id": None}


def cache_for(model, name, keep=24):
    return kvtrim.Cache(model, name, keep, **small(name))


def logits(model, ids, cache=None):
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


@contextmanager
def meanwhile(module, happen):
    """Something happens once, in the middle of a pass."""
    once = [happen]

    def now(*_):
        if once:
            once.pop()()

    hook = module.register_forward_hook(now)
    yield
    hook.remove()


@pytest.mark.parametrize("names", [["snapkv", "kvzip", "h2o"], ["fastkv", "gemfilter"]])
def test_threads_on_one_model_answer_as_they_would_alone(names):
    model, tokenizer = models.tiny("llama"), models.tokenizer()
    jobs = [(text * 4, name) for text in ("one two", "a longer text") for name in names]

    def ask(job):
        text, name = job
        told = []
        found = kvtrim.generate(
            model,
            tokenizer,
            text,
            "who?",
            method=name,
            keep=24,
            max_new_tokens=4,
            repetition_penalty=1.5,
            progress=lambda *how: told.append(how),
            **small(name),
        )
        return found.answers[0].token_ids, told

    def plain(ids):
        return model.generate(ids, **NEW).tolist()

    alone, ids = [ask(job) for job in jobs], models.prompt(30)
    usual = plain(ids)
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(ask, jobs * 3)
        stock = pool.map(plain, [ids] * 6)
        assert list(answers) == alone * 3
        assert list(stock) == [usual] * 6
    assert not is_attached(model)


def test_a_block_that_ends_leaves_the_others_attached(llama):
    first = kvtrim.attach(llama)
    ids, cache = models.prompt(40), cache_for(llama, "full", 100)
    expected = logits(llama, ids)
    first.__enter__()
    with kvtrim.attach(llama):
        logits(llama, ids[:, :39], cache)
        with meanwhile(llama.model.embed_tokens, first.__exit__):
            last = logits(llama, ids[:, 39:], cache)
        torch.testing.assert_close(last[0, -1], expected[0, -1], rtol=1e-9, atol=1e-9)
        assert is_attached(llama)
    assert not is_attached(llama)


def test_calls_are_counted_and_blocks_of_other_threads_are_left_alone(llama):
    kvtrim.attach(llama)
    kvtrim.attach(llama)
    kvtrim.detach(llama)
    assert is_attached(llama)
    kvtrim.detach(llama)
    assert not is_attached(llama)
    with kvtrim.attach(llama):
        thread = threading.Thread(target=kvtrim.detach, args=[llama])
        thread.start()
        thread.join()
        assert is_attached(llama)
        kvtrim.detach(llama)
        assert not is_attached(llama)


@pytest.mark.parametrize("module", [0, 1, 2])
def test_a_model_detached_in_the_middle_of_a_pass_is_noticed(llama, module):
    ids, cache = models.prompt(40), cache_for(llama, "snapkv")
    kvtrim.attach(llama)
    logits(llama, ids, cache)
    within = llama.model.embed_tokens if module == 0 else llama.model.layers[module - 1]
    with meanwhile(within, lambda: kvtrim.detach(llama)), pytest.raises(NotAttachedError):
        logits(llama, ids[:, :1], cache)
    with pytest.raises(NotAttachedError):
        logits(llama, ids[:, :1], cache)
    with kvtrim.attach(llama), pytest.raises(CacheError, match="interrupted"):
        logits(llama, ids[:, :1], cache)


@pytest.mark.parametrize("at", ["before", "embedding", "layer"])
def test_a_changed_attention_implementation_is_noticed_and_left_as_chosen(llama, at):
    ids, cache = models.prompt(40), cache_for(llama, "snapkv")
    within = {
        "embedding": llama.model.embed_tokens,
        "layer": llama.model.layers[0],
    }
    expected = logits(llama, ids)
    with kvtrim.attach(llama):
        change = lambda: llama.set_attn_implementation("eager")  # noqa: E731
        if at == "before":
            change()
            with pytest.raises(CacheError, match="changed to 'eager'"):
                logits(llama, ids, cache)
            assert cache.seen == 0
        else:
            with (
                meanwhile(within[at], change),
                pytest.raises(CacheError, match="changed to 'eager'"),
            ):
                logits(llama, ids, cache)
        torch.testing.assert_close(logits(llama, ids), expected, rtol=1e-6, atol=1e-6)
    assert llama.config._attn_implementation == "eager"
    with kvtrim.attach(llama):
        logits(llama, ids, cache_for(llama, "snapkv"))
    assert llama.config._attn_implementation == "eager"


def test_layers_that_attend_elsewhere_are_noticed(llama):
    cache, ids = cache_for(llama, "snapkv"), models.prompt(40)
    handed = {}
    cache.session._tap = handed.__setitem__
    with kvtrim.attach(llama):
        logits(llama, ids, cache)
    other = cache_for(llama, "snapkv")
    other.begin_pass(Coming(1, 40, None, ids))
    for index in (0, 2):
        other.session.absorb(index, handed[index])
    with pytest.raises(CacheError, match="1 of 3 layers did not attend through kvtrim"):
        other.end_pass()
    with kvtrim.attach(llama), pytest.raises(CacheError, match="interrupted"):
        logits(llama, ids[:, :1], other)


@pytest.mark.parametrize("module", [0, 1])
def test_an_ordinary_pass_under_way_does_not_mind_who_attaches_or_detaches(any_model, module):
    decoder, ids = any_model.model, models.prompt(30)
    within = decoder.embed_tokens if module == 0 else decoder.layers[0]
    expected = logits(any_model, ids, DynamicCache(config=any_model.config))
    for change in (lambda: kvtrim.attach(any_model), lambda: kvtrim.detach(any_model)):
        with meanwhile(within, change):
            now = logits(any_model, ids, DynamicCache(config=any_model.config))
        torch.testing.assert_close(now, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["none", "dynamic", "static"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3_text"])
def test_every_stock_cache_works_on_an_attached_model(architecture, kind, implementation):
    any_model = models.tiny(architecture, dtype=torch.float32)
    if architecture == "gemma2" and implementation == "sdpa":
        pytest.skip("transformers refuses sdpa for a softcap")
    any_model.set_attn_implementation(implementation)
    ids = models.prompt(24, rows=2)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    asked = {"attention_mask": mask, **NEW, "max_new_tokens": 3, "output_logits": True}
    asked |= {"use_cache": False} if kind == "none" else {"cache_implementation": kind}
    plain = any_model.generate(ids, **asked, return_dict_in_generate=True).logits
    with kvtrim.attach(any_model):
        attached = any_model.generate(ids, **asked, return_dict_in_generate=True).logits
    assert all(map(torch.equal, attached, plain)) and len(attached) == 3


def test_a_static_cache_goes_on_over_attaching_and_detaching(llama):
    ids = models.prompt(12)
    expected = logits(llama, ids)[0, -3:]
    cache = StaticCache(llama.config, max_cache_len=20)
    logits(llama, ids[:, :9], cache)
    found = []
    for at, around in enumerate([kvtrim.attach, lambda model: torch.no_grad(), kvtrim.attach]):
        with around(llama):
            found.append(logits(llama, ids[:, 9 + at : 10 + at], cache)[0, 0])
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-9, atol=1e-9)


def test_attentions_of_ordinary_caches_are_those_of_the_stock_model(llama):
    llama.set_attn_implementation("eager")
    ids = models.prompt(9)
    with torch.no_grad():
        expected = llama(ids, output_attentions=True).attentions
        with kvtrim.attach(llama):
            found = llama(ids, output_attentions=True).attentions
    assert all(map(torch.equal, found, expected)) and len(found) == 3


def test_a_deep_copy_of_an_attached_model_is_attached_on_its_own(llama):
    ids = models.prompt(40)
    stock = llama.config._attn_implementation
    with kvtrim.attach(llama):
        expected = logits(llama, ids, cache_for(llama, "gemfilter"))
        other = copy.deepcopy(llama)
    assert not is_attached(llama) and is_attached(other)
    assert torch.equal(logits(other, ids, cache_for(other, "gemfilter")), expected)
    with pytest.raises(NotAttachedError):
        logits(llama, ids, cache_for(llama, "snapkv"))
    with pytest.raises(CacheError, match="another model"):
        logits(other, ids, cache_for(llama, "snapkv"))
    kvtrim.detach(other)
    assert other.config._attn_implementation == stock and not is_attached(other)
    assert torch.equal(logits(other, ids), logits(llama, ids))


def test_models_that_share_a_decoder_share_what_is_attached(llama):
    other, ids = copy.copy(llama), models.prompt(40)
    with kvtrim.attach(llama), kvtrim.attach(other):
        found = [logits(llama, ids, cache_for(one, "snapkv")) for one in (llama, other)]
        assert torch.equal(*found)
    assert not is_attached(other)


def test_two_attached_models_that_share_a_configuration_detach_in_any_order():
    one = models.tiny("llama")
    two = type(one)(one.config).double().eval()
    ids, stock = models.prompt(30), one.config._attn_implementation
    kvtrim.attach(one)
    with kvtrim.attach(two):
        kvtrim.detach(one)
        logits(two, ids, cache_for(two, "snapkv"))
        logits(one, ids)
    assert one.config._attn_implementation == stock


def test_what_cannot_be_pickled_says_what_to_do_instead(llama):
    with kvtrim.attach(llama):
        with pytest.raises(UsageError, match=r"kvtrim\.detach"):
            pickle.dumps(llama)
        with pytest.raises(UsageError, match=r"kvtrim\.detach"):
            torch.save(llama, io.BytesIO())
        cache = cache_for(llama, "snapkv")
        read(llama, models.prompt(40), cache)
        with pytest.raises(CacheError, match=r"cache\.save"):
            pickle.dumps(cache)
        other = copy.copy(cache)
        logits(llama, models.prompt(3), other)
    assert (cache.seen, other.seen) == (40, 43)
    assert pickle.loads(pickle.dumps(llama)).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("wrong", [("snapkv",), (None, 512), (None, None)])
def test_arguments_in_the_wrong_place_are_named(llama, wrong):
    arguments = [llama if given is None else given for given in wrong[:1]] + list(wrong[1:])
    make = inspect.unwrap(kvtrim.Cache.__init__)  # the tests' own check of types stands before it
    with pytest.raises(UsageError, match=r'kvtrim\.Cache\(model, "snapkv", keep=512\)'):
        make(object.__new__(kvtrim.Cache), *arguments)


def test_an_interrupted_probe_is_noticed(llama):
    cache, ids = cache_for(llama, "kvzip"), models.prompt(40)
    passes = []

    def stop(*_):
        passes.append(1)
        if len(passes) == 2:  # the probe's
            raise KeyboardInterrupt

    with kvtrim.attach(llama):
        hook = llama.model.layers[1].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            logits(llama, ids, cache)
        hook.remove()
        with pytest.raises(CacheError, match="interrupted"):
            logits(llama, ids[:, :1], cache)


def test_an_interrupted_pass_is_noticed_on_a_detached_model_too(llama):
    cache, ids = cache_for(llama, "full"), models.prompt(40)

    def stop(*_):
        raise KeyboardInterrupt

    for module in (llama.model.layers[1], llama.model.layers[0].self_attn.q_proj):
        with kvtrim.attach(llama):
            fresh = cache.copy()
            hook = module.register_forward_pre_hook(stop)
            with pytest.raises(KeyboardInterrupt):
                logits(llama, ids, fresh)
            hook.remove()
        with pytest.raises(NotAttachedError):
            logits(llama, ids[:, :1], fresh)


def test_generating_by_hand_and_by_generate_from_threads_are_the_same(llama):
    ids = models.prompt(40)

    def go(name):
        cache = cache_for(llama, name)
        return generate(llama, ids, cache, 4).token_ids

    with kvtrim.attach(llama), ThreadPoolExecutor(3) as pool:
        names = ["snapkv", "gemfilter", "h2o"]
        assert list(pool.map(go, names * 3)) == [go(name) for name in names] * 3
