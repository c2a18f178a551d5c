"""Attaching leaves a model as it was, and serves ordinary caches meanwhile."""

import copy
import gc
import subprocess
import sys
import weakref

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import kvtrim
import models
from kvtrim.errors import UnsupportedModelError, UsageError
from kvtrim.hf.base import cache_keyword
from kvtrim.hf.models.architectures import layout
from models import is_attached


def state(model):
    """Everything about a model that attaching could change."""
    hooks = [
        (
            len(m._forward_pre_hooks),
            len(m._forward_hooks),
            sorted(vars(m)),
            [n for n, _ in m.named_children()],
        )
        for m in model.modules()
    ]
    return hooks, model.config.to_dict(), model.config._attn_implementation


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_detach_restores_the_model_exactly(any_model, implementation):
    if any_model.config.model_type == "gemma2" and implementation == "sdpa":
        pytest.skip("transformers refuses sdpa for a softcap")
    any_model.set_attn_implementation(implementation)
    before = state(any_model)
    kvtrim.attach(any_model)
    assert any_model.config._attn_implementation == "kvtrim"
    kvtrim.detach(any_model)
    assert state(any_model) == before
    kvtrim.detach(any_model)
    with kvtrim.attach(any_model):
        pass
    assert state(any_model) == before


def test_an_error_inside_the_block_detaches_too(llama):
    before = state(llama)
    with pytest.raises(RuntimeError), kvtrim.attach(llama):
        raise RuntimeError
    assert state(llama) == before


def test_blocks_nest_and_an_explicit_attach_stays(llama):
    with kvtrim.attach(llama):
        with kvtrim.attach(llama):
            pass
        assert is_attached(llama)
    assert not is_attached(llama)
    kvtrim.attach(llama)
    with kvtrim.attach(llama):
        pass
    assert is_attached(llama)
    kvtrim.detach(llama)


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_ordinary_caches_work_on_an_attached_model(architecture):
    any_model = models.tiny(architecture, dtype=torch.float32)
    ids = models.prompt(40)
    mask = torch.ones_like(ids)
    mask[:, :7] = 0
    with torch.no_grad():
        plain = any_model(ids, attention_mask=mask).logits
        turns = DynamicCache(config=any_model.config)
        any_model(ids[:, :30], past_key_values=turns)
        second = any_model(ids[:, 30:], past_key_values=turns).logits
        with kvtrim.attach(any_model):
            attached = any_model(ids, attention_mask=mask).logits
            again = DynamicCache(config=any_model.config)
            any_model(ids[:, :30], past_key_values=again)
            second_attached = any_model(ids[:, 30:], past_key_values=again).logits
    torch.testing.assert_close(attached[:, 7:], plain[:, 7:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second_attached, second, rtol=1e-4, atol=1e-4)


def test_a_model_that_shares_its_configuration_is_not_disturbed():
    sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    config = LlamaConfig(**sizes, num_attention_heads=2)
    one, two = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    ids = models.prompt(9) % 50
    with torch.no_grad():
        expected = two(ids).logits
        with kvtrim.attach(one):
            assert torch.equal(two(ids).logits, expected)


def test_an_attached_model_can_be_freed():
    model = models.tiny("llama")
    kvtrim.attach(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_untested_architectures_are_refused_by_name():
    from transformers import GPT2Config, GPT2LMHeadModel, NemotronConfig, NemotronForCausalLM

    sizes = dict(vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    nemotron = NemotronForCausalLM(NemotronConfig(**sizes, **heads)).eval()
    with pytest.raises(
        UnsupportedModelError, match=r"'nemotron' is untested; tested are .*llama.*check"
    ):
        kvtrim.attach(nemotron)
    ids = models.prompt(40)
    with torch.no_grad(), kvtrim.attach(nemotron, allow_untested=True):
        nemotron(ids, past_key_values=kvtrim.Cache(nemotron, "adakv", 24, window=8))
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20))
    with pytest.raises(UnsupportedModelError, match="cannot find one attention module"):
        kvtrim.attach(gpt, allow_untested=True)


def test_sliding_layers_are_left_alone_and_a_model_of_nothing_else_is_refused():
    assert layout(models.tiny("gemma3_text")).managed == [1, 2]
    sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128)
    sliding = MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=64))
    with pytest.raises(UnsupportedModelError, match="slides over 64 tokens"):
        kvtrim.attach(sliding)
    endless = MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=4096))
    assert layout(endless).managed == [0, 1]


def test_importing_kvtrim_imports_neither_torch_nor_transformers():
    code = (
        "import sys, kvtrim, kvtrim.cli; assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_attached_model_can_be_copied(llama):
    with kvtrim.attach(llama):
        other = copy.deepcopy(llama)
    assert other is not llama


@pytest.mark.parametrize("called", ["model", "decoder"])
@pytest.mark.parametrize("keyword", [cache_keyword, lambda cache: {"past_key_values": cache}])
def test_a_cache_is_found_by_the_name_that_transformers_has_or_had_for_it(llama, keyword, called):
    cache, call = kvtrim.Cache(llama, "full"), llama if called == "model" else llama.get_decoder()
    with torch.no_grad(), kvtrim.attach(llama):
        call(input_ids=models.prompt(20), **keyword(cache))
    assert cache.seen == 20 and cache.entries()[0].tolist() == [[20, 20]]


def losses(model, ids, cache):
    model.zero_grad()
    out = model(ids, **cache_keyword(cache)).logits
    return out[0, -1].log_softmax(-1)[7]


def test_gradients_are_refused_where_they_are_asked_for(llama):
    ids = models.prompt(20)
    llama.requires_grad_()
    with kvtrim.attach(llama):
        loss = losses(llama, ids, kvtrim.Cache(llama, "full"))
        with pytest.raises(UsageError, match="gradients do not pass"):
            loss.backward()
        with torch.no_grad():
            assert losses(llama, ids, kvtrim.Cache(llama, "full")) == loss.detach()


def test_gradients_pass_through_an_ordinary_cache_as_ever(llama):
    ids, weight = models.prompt(20), llama.model.layers[1].self_attn.v_proj.weight
    llama.requires_grad_()
    losses(llama, ids, DynamicCache(config=llama.config)).backward()
    want = weight.grad.clone()
    with kvtrim.attach(llama):
        losses(llama, ids, DynamicCache(config=llama.config)).backward()
    torch.testing.assert_close(weight.grad, want)
    assert want.abs().max() > 0


@pytest.mark.parametrize("said", ["as a keyword", "in the configuration"])
def test_attention_weights_are_handed_out_as_ever_or_refused(llama, said):
    llama.set_attn_implementation("eager")
    ids, asked = models.prompt(20), {"output_attentions": True}
    if said == "in the configuration":
        llama.config.output_attentions, asked = True, {}
    with torch.no_grad():
        want = llama(ids, **asked).attentions
        with kvtrim.attach(llama):
            for got, own in zip(llama(ids, **asked).attentions, want, strict=True):
                assert torch.equal(got, own)
            cache = kvtrim.Cache(llama, "full")
            with pytest.raises(UsageError, match="no attention weights"):
                llama(ids, **cache_keyword(cache), **asked)
            assert cache.seen == 0 and len(want) == 3


def test_a_model_with_learnt_sinks_serves_ordinary_caches_and_refuses_ours():
    from transformers import AutoConfig, AutoModelForCausalLM

    known = models.config("llama").to_dict()
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    own = {name: known[name] for name in (*names, "num_key_value_heads", "pad_token_id")}
    config = AutoConfig.for_model(
        "gpt_oss",
        **own,
        intermediate_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    )
    torch.manual_seed(0)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), models.prompt(40)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.normal_(mean=3)
        want = model(ids).logits
        with kvtrim.attach(model, allow_untested=True):
            assert torch.equal(model(ids).logits, want)
            with pytest.raises(UnsupportedModelError, match="s_aux"):
                model(ids, **cache_keyword(kvtrim.Cache(model, "full")))


@pytest.mark.parametrize("said", ["as a keyword", "in its modules"])
def test_a_model_that_reads_both_ways_is_refused(llama, said):
    asked = {"is_causal": False} if said == "as a keyword" else {}
    for layer in llama.model.layers if said == "in its modules" else []:
        layer.self_attn.is_causal = False
    with torch.no_grad(), kvtrim.attach(llama):
        with pytest.raises(UnsupportedModelError, match="left to right"):
            llama(models.prompt(9), **cache_keyword(kvtrim.Cache(llama, "full")), **asked)
