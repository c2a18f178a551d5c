"""Every architecture that kvtrim says it is tested on, as a tiny random model."""

import copy
from functools import cache

import pytest
import torch
import transformers
from test_equivalence import masks_of, step_through
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import kvtrim
import models
import oracles
from kvtrim.cli import app
from kvtrim.errors import UnsupportedModelError
from kvtrim.hf.models.architectures import SUPPORTED
from kvtrim.hf.models.check import check_model
from kvtrim.hf.rotary import rotations
from small import small

EVERY = [*models.ARCHITECTURES, *models.FURTHER]
EVICTING = ["criticalkv", "kvzip"]  # by head and by the output projection; by a probe
NARROWING = ["fastkv", "gemfilter"]


@cache
def made(architecture):
    """One model for all tests of this file, which leave it as it is."""
    return models.tiny(architecture)


def test_every_supported_architecture_is_in_the_test_matrix():
    assert sorted(EVERY) == sorted(SUPPORTED)


@pytest.mark.parametrize("architecture", ["llama", *models.FURTHER])
def test_check_finds_them_good(architecture):
    assert [each.what for each in check_model(made(architecture)) if not each.passed] == []


@pytest.mark.parametrize("architecture", models.FURTHER)
def test_evicting_equals_masking_on_them(architecture):
    model, ids = made(architecture), models.prompt(50, seed=1)
    for name in EVICTING:
        cache = kvtrim.Cache(model, name, 24, **small(name))
        logits, seen, read = step_through(model, cache, ids, 48)
        expected = oracles.run_masked(model, ids, masks_of(model, cache, seen, read, 50, 48))
        torch.testing.assert_close(logits, expected, rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.parametrize("architecture", models.FURTHER)
def test_a_part_of_the_prompt_is_read_in_a_padded_batch_as_alone(architecture):
    model = made(architecture)
    if any("sliding" in each for each in getattr(model.config, "layer_types", None) or []):
        with pytest.raises(UnsupportedModelError, match="slide"):
            kvtrim.Cache(model, "fastkv", 24, **small("fastkv"))
        return
    ids, mask = models.prompt(60, rows=2), torch.ones(2, 60, dtype=torch.int64)
    mask[1, :9] = 0
    for name in NARROWING:
        both, alone = (kvtrim.Cache(model, name, 24, **small(name)) for _ in range(2))
        with torch.no_grad(), kvtrim.attach(model):
            at = (mask.cumsum(1) - 1).clamp(min=0)
            rows = model(ids, attention_mask=mask, position_ids=at, past_key_values=both).logits
            one = model(ids[1:, 9:], past_key_values=alone).logits
        torch.testing.assert_close(rows[1:, -1], one[:, -1], rtol=1e-8, atol=1e-8, msg=name)
        held, own = models.positions(both, row=1), models.positions(alone)
        assert held == own, name
        assert sum(map(len, own[-1])) < 2 * 51, "nothing was left out, so nothing was proven"


@pytest.mark.parametrize("architecture", EVERY)
def test_keys_are_turned_as_the_model_turns_them_or_not_at_all(architecture):
    """What positions='rolled' rests on: a token's keys elsewhere are its keys turned on.

    In the first layers that kvtrim manages; whatever they do, they are refused or right.
    """
    model, ids, by = made(architecture), models.prompt(1), 37
    try:
        turns = rotations(model)
    except UnsupportedModelError as error:
        assert "tested on" in str(error)
        return
    held = []
    for at in (5, 5 + by):
        cache = kvtrim.Cache(model, "full")
        with torch.no_grad(), kvtrim.attach(model):
            model(ids, position_ids=torch.tensor([[at]]), past_key_values=cache)
        held.append([store.buffers["keys"] for store in cache.session.state.stores()])
    for turn, here, there in zip(turns, *held, strict=True):  # one token attends to itself alone
        moved = turn(here, torch.full(here.shape[:1], by))
        torch.testing.assert_close(moved, there, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", models.MIXED)
@pytest.mark.parametrize("asked", [True, False])
def test_router_logits_are_handed_out_as_ever(architecture, asked):
    model, ids = made(architecture), models.prompt(30)
    with torch.no_grad():
        plain = model(ids, output_router_logits=asked, use_cache=False)
        with kvtrim.attach(model):
            own = kvtrim.Cache(model, "full")
            got = model(ids, output_router_logits=asked, past_key_values=own)
    torch.testing.assert_close(got.logits, plain.logits)
    assert (got.router_logits is not None) == asked
    for one, other in zip(got.router_logits or [], plain.router_logits or [], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["num_items_in_batch", "output_hidden_states", "use_cache"])
def test_words_that_mean_nothing_to_attention_are_let_through(llama, name):
    cache = kvtrim.Cache(llama, "full")
    with torch.no_grad(), kvtrim.attach(llama):
        llama(models.prompt(9), past_key_values=cache, **{name: True})
    assert cache.seen == 9


def sizes(**more):
    known = models.config("llama").to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "max_position_embeddings")
    return {name: known[name] for name in names} | more


LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
LATENT |= {"v_head_dim": 6, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
LATENT |= {"topk_group": 1, "moe_intermediate_size": 16}


@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3"])
def test_latent_attention_is_refused_since_its_cache_would_grow(kind):
    """transformers holds a latent per token; what kvtrim is handed is every head's K and V."""
    latent = AutoConfig.for_model(kind, **sizes(num_key_value_heads=6, **LATENT))
    if kind == "deepseek_v2":
        latent.topk_method = "greedy"
    model = AutoModelForCausalLM.from_config(latent)
    stock = transformers.DynamicCache(config=latent)
    with torch.no_grad():
        model(models.prompt(10), past_key_values=stock)
    heads = latent.num_attention_heads * (12 + 6)
    numbers = sum(layer.keys.shape[-1] + layer.values.shape[-1] for layer in stock.layers)
    assert numbers == 3 * 20 < 3 * heads, "a latent of 16 and 4 rotated numbers for all heads"
    with pytest.raises(UnsupportedModelError, match=r"latent of 16 numbers .* \(MLA\)"):
        kvtrim.attach(model, allow_untested=True)


UNFIT = {  # models whose own code breaks under any cache but theirs, or under another's mask
    "doge": {"num_key_value_heads": 2},
    "minimax": {"num_local_experts": 2, "layer_types": ["full_attention"] * 3},
    "gpt_neox": {},
}


@pytest.mark.parametrize("kind", UNFIT)
def test_whatever_a_model_raises_under_check_is_its_answer(kind, tmp_path):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes(**UNFIT[kind])))
    findings = check_model(model.eval())
    failed = [each for each in findings if not each.passed]
    assert failed and all(each.why and each.difference is None for each in failed)
    model.save_pretrained(tmp_path)
    models.tokenizer().save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert result.exit_code == 1 and result.exception.__class__ is SystemExit
    assert failed[0].what in result.stdout and failed[0].why[:40] in result.stderr
    assert not models.is_attached(copy.copy(model))
