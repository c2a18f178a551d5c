"""Phi-3's long RoPE turns everything by other frequencies above a length; Phi-3 reads again there.

A kvtrim cache is used to the end, or refused before any work.
"""

import pytest
import torch
from transformers import Phi3Config, PhimoeConfig

import kvtrim
import models
from kvtrim.engine.branch import Branch
from kvtrim.errors import CacheError, UsageError
from kvtrim.hf.base import cache_in, cache_keyword
from kvtrim.hf.batch import join, positions
from kvtrim.hf.models.architectures import window
from kvtrim.hf.pack import Feed, Pack, base_of, position
from kvtrim.methods.request import Request as Settled
from kvtrim.serve import documents
from kvtrim.serve.library import Library
from kvtrim.serve.reader import Reader
from kvtrim.serve.request import Upload
from small import small

SWITCH = 64


def made(kind=Phi3Config, **more):
    known = models.config("phi3").to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4}
    rope |= {"long_factor": [2.0, 3.0, 4.0, 5.0], "original_max_position_embeddings": SWITCH}
    if kind is PhimoeConfig:
        rope |= {"short_mscale": 1.0, "long_mscale": 1.0}
    config = kind(
        **{name: known[name] for name in names},
        sliding_window=None,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        original_max_position_embeddings=SWITCH,
        rope_parameters=rope,
        **more,
    )
    torch.manual_seed(0)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "_proj" in name and "attn" in name:
            parameter.data.mul_(6)
    return model.eval()


@pytest.fixture(params=["phi3", "phimoe"], scope="module")
def model(request):
    if request.param == "phi3":
        return made().double()
    return made(PhimoeConfig, num_local_experts=2, num_experts_per_tok=2)


def watched(model):
    """What the decoder is given: tokens, and whether the cache is kvtrim's."""
    calls = []

    def look(module, args, kwargs):
        fed = kwargs["input_ids"]
        calls.append((fed.shape[1], isinstance(cache_in(kwargs), kvtrim.Cache)))

    return calls, model.get_decoder().register_forward_pre_hook(look, with_kwargs=True)


@pytest.mark.parametrize("length", [SWITCH - 20, SWITCH, SWITCH + 1, SWITCH + 30])
def test_generate_uses_the_cache_that_it_is_given_to_the_end(model, length):
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    if SWITCH - 5 < length <= SWITCH:
        options["max_new_tokens"] = SWITCH - length + 1
    ids = models.prompt(length)
    want = model.generate(ids, **options)
    calls, hook = watched(model)
    with kvtrim.attach(model):
        got = model.generate(ids, **cache_keyword(kvtrim.Cache(model, "full")), **options)
        kept = kvtrim.Cache(model, "snapkv", 16, window=8)
        model.generate(ids, **cache_keyword(kept), **options)
    hook.remove()
    assert torch.equal(got, want), "nothing was evicted, and no key is turned otherwise"
    assert all(own for _, own in calls)
    assert [count for count, _ in calls if count > 1] == [length] * 2, "read once each"
    assert kept.seen == length + options["max_new_tokens"] - 1


def test_a_cache_read_below_is_refused_beyond_and_stays_as_it_was(model):
    cache, ids = kvtrim.Cache(model, "snapkv", 16, window=8), models.prompt(SWITCH + 10)
    with torch.no_grad(), kvtrim.attach(model):
        model(ids[:, : SWITCH - 4], **cache_keyword(cache))
        with pytest.raises(CacheError, match=f"frequencies from {SWITCH} tokens on"):
            model(ids[:, SWITCH - 4 : SWITCH + 1], **cache_keyword(cache))
        model(ids[:, SWITCH - 4 : SWITCH], **cache_keyword(cache))
        for again in (cache.copy(), cache):
            with pytest.raises(CacheError, match="frequencies"):
                model(ids[:, SWITCH : SWITCH + 1], **cache_keyword(again))
    assert cache.seen == SWITCH


def test_a_cache_cropped_back_from_beyond_is_refused_below(model):
    cache, ids = kvtrim.Cache(model, "full"), models.prompt(SWITCH + 4)
    with torch.no_grad(), kvtrim.attach(model):
        model(ids, **cache_keyword(cache))
        cache.crop(-10)
        with pytest.raises(CacheError, match="read beyond it"):
            model(ids[:, :1], **cache_keyword(cache))
        model(ids[:, :10], **cache_keyword(cache))
        cache.reset()
        model(ids[:, :10], **cache_keyword(cache))
    assert cache.seen == 10


def test_questions_that_would_go_beyond_are_refused_before_any_work(model):
    tokenizer, context = models.tokenizer(chat=False), "a" * (SWITCH - 10)
    settings = {"method": "snapkv", "keep": 16, "window": 8}
    cache = kvtrim.compress(model, tokenizer, context, **settings)
    calls, hook = watched(model)
    ask = settings | {"max_new_tokens": 20}
    for given in (cache, context):
        for question in ("b", ["b", "c"]):
            with pytest.raises(CacheError, match="rotary frequencies"):
                kvtrim.generate(
                    model,
                    tokenizer,
                    given,
                    question,
                    **(ask if given is context else {"max_new_tokens": 20}),
                )
    with pytest.raises(CacheError, match="rotary frequencies"):
        kvtrim.compress(model, tokenizer, "a" * 90, prefill_chunk=30, **settings)
    assert calls == []
    assert kvtrim.generate(model, tokenizer, cache, "b", max_new_tokens=2).answers[0].token_ids
    whole = kvtrim.generate(model, tokenizer, "a" * (SWITCH + 9), "b", **ask)
    hook.remove()
    assert all(own for _, own in calls) and whole.held_bytes < whole.full_bytes


def test_caches_read_on_both_sides_do_not_go_on_together(model):
    caches = [kvtrim.Cache(model, "snapkv", 16, window=8) for _ in range(2)]
    with torch.no_grad(), kvtrim.attach(model):
        model(models.prompt(30), **cache_keyword(caches[0]))
        model(models.prompt(SWITCH + 9), **cache_keyword(caches[1]))
        both = join(caches)
        with pytest.raises(CacheError, match="frequencies"):
            model(models.prompt(1, rows=2), position_ids=positions(both, 1), **cache_keyword(both))


def test_a_prompt_that_closes_up_counts_as_long_as_what_is_read_of_it():
    model, ids = made().double(), models.prompt(SWITCH + 26)
    cache = kvtrim.Cache(model, "gemfilter", 24, **small("gemfilter"))
    with torch.no_grad(), kvtrim.attach(model):
        model(ids, **cache_keyword(cache))
        read = SWITCH + 26 - cache.session.state.closed_up[0]
        assert read < SWITCH, "the part that is read is below"
        with pytest.warns(UserWarning, match="was applied to the prompt"):
            model(ids[:, : SWITCH - read], **cache_keyword(cache))
        with pytest.raises(CacheError, match="frequencies"):
            model(ids[:, :1], **cache_keyword(cache))


def test_models_without_a_switch_are_true_and_cross_nothing(llama):
    cache = kvtrim.Cache(llama, "full")
    assert cache and cache.rope.switch is None


def fed_alone(model, cache, ids):
    """Logits after each token through the cache's own attention."""
    found = []
    with torch.no_grad(), kvtrim.attach(model):
        for token in ids:
            at = torch.tensor([[cache.seen]])
            asked = {"position_ids": at, **cache_keyword(cache)}
            found.append(model(torch.tensor([[token]]), **asked).logits[0, -1])
    return found


@pytest.mark.parametrize("method", ["snapkv", "gemfilter"])
def test_prompts_share_passes_below_the_switch_and_none_goes_beyond(model, method):
    bases, expected, pack = [], [], Pack(model)
    lines = torch.randint(4, 250, (3, 6), generator=torch.Generator().manual_seed(1)).tolist()
    for tokens in (30, 50):
        cache = kvtrim.Cache(model, method, 20, **small(method))
        with torch.no_grad(), kvtrim.attach(model):
            model(models.prompt(tokens), **cache_keyword(cache))
        expected.append(fed_alone(model, cache.copy(), lines[len(bases)]))
        bases.append(base_of(cache))
    expected.append(fed_alone(model, kvtrim.Cache(model, "full", 1.0), lines[2]))
    branches = [Branch(bases[0]), Branch(bases[1]), Branch()]
    with kvtrim.attach(model):
        for step in range(6):
            feeds = [Feed(b, [line[step]]) for b, line in zip(branches, lines, strict=True)]
            for row, want in zip(pack.feed(model, feeds), expected, strict=True):
                torch.testing.assert_close(row, want[step], atol=1e-5, rtol=1e-4)
        room = SWITCH - position(branches[1])
        before = list(branches[1].ids)
        with pytest.raises(CacheError, match="other rotary frequencies"):
            pack.feed(model, [Feed(branches[0], [5]), Feed(branches[1], [5] * (room + 1))])
        assert branches[1].ids == before
        pack.feed(model, [Feed(branches[0], [5]), Feed(branches[1], [5] * room)])


def test_what_was_read_beyond_the_switch_is_not_shared(model):
    cache = kvtrim.Cache(model, "snapkv", 20, window=8)
    with torch.no_grad(), kvtrim.attach(model):
        model(models.prompt(SWITCH + 9), **cache_keyword(cache))
    with pytest.raises(CacheError, match=r"beyond that \(73 tokens\)"):
        base_of(cache)
    cache.rope.beyond = None  # as of a file
    with pytest.raises(CacheError, match="cannot share passes"):
        base_of(cache)


def test_it_is_served_below_the_switch_and_told_why_not_beyond(model, tmp_path):
    prints = documents.Prints.of("tiny", model, models.tokenizer())
    library = Library(tmp_path / "library")
    reader = Reader(model, models.tokenizer(), prints, library)
    assert reader.window == SWITCH
    with pytest.raises(UsageError, match=f"above {SWITCH} tokens this model turns keys by"):
        reader.upload(
            Upload("long", "word " * 30, documents.How(Settled.of("snapkv", "40")), print)
        )
    plain = models.tiny("llama")
    prints = documents.Prints.of("tiny", plain, models.tokenizer())
    own = Reader(plain, models.tokenizer(), prints, library)
    assert own.window == window(plain) and own.limit.startswith("the model's window takes")
