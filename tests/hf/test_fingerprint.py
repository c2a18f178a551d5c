"""A fingerprint tells apart everything that changes what a model's K and V mean, and no more."""

import copy
import random

import pytest
import torch
from torch.nn.functional import linear

import kvtrim
import models
from kvtrim.hf.models import fingerprint


def differs(one, other):
    return fingerprint.differences(fingerprint.complete(one), fingerprint.complete(other))


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_a_change_of_any_row_or_column_of_any_parameter_is_seen(architecture):
    model, draw = models.tiny(architecture), random.Random(0)
    before = fingerprint.complete(model)
    for name, parameter in model.named_parameters():
        dimension = draw.randrange(parameter.ndim)
        part = parameter.data.select(dimension, draw.randrange(parameter.shape[dimension]))
        saved = part.clone()
        part.add_(0.01)
        assert fingerprint.differences(before, fingerprint.complete(model)), name
        part.copy_(saved)
    assert not fingerprint.differences(before, fingerprint.complete(model))


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (5,), (4, 6), (2, 3, 5), (1, 9), (64, 48)])
def test_every_row_and_every_column_is_sampled(shape):
    rows = torch.arange(torch.Size(shape).numel()).view(-1, shape[-1])
    seen = fingerprint.sample(rows.view(shape)).long()
    assert set((seen // shape[-1]).tolist()) == set(range(rows.shape[0]))
    assert set((seen % shape[-1]).tolist()) == set(range(shape[-1]))


VALUES = {
    "rms_norm_eps": 0.1,
    "attention_bias": True,
    "hidden_act": "gelu",
    "tie_word_embeddings": True,
    "max_position_embeddings": 1024,
    "sliding_window": 7,
}


@pytest.mark.parametrize("name", VALUES)
def test_values_of_the_configuration_that_change_logits_are_seen(name):
    other = models.tiny()
    setattr(other.config, name, VALUES[name])
    assert any(name in found for found in differs(models.tiny(), other))


def test_values_that_change_no_logits_are_not():
    other = models.tiny()
    for name, value in {
        "_name_or_path": "elsewhere",
        "use_cache": False,
        "eos_token_id": 7,
    }.items():
        setattr(other.config, name, value)
    other.generation_config.temperature = 0.5
    assert not differs(models.tiny(), other)


def by_hook(model):
    layer = model.model.layers[1].self_attn.k_proj
    layer.register_forward_hook(lambda module, args, output: 1.5 * output)


def by_pre_hook(model):
    layer = model.model.layers[1].mlp
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def by_forward(model):
    layer = model.model.layers[0].self_attn.v_proj
    layer.forward = lambda x: 2 * linear(x, layer.weight)


def by_buffer(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def by_scale(model):
    model.model.layers[2].self_attn.scaling *= 2


def by_epsilon(model):
    model.model.norm.variance_epsilon = 0.1


def by_adapter(model):
    model.model.layers[0].self_attn.q_proj.register_parameter(
        "lora_A", torch.nn.Parameter(torch.zeros(2, 2))
    )


def by_switch(model):
    model.model.layers[0].self_attn.q_proj.disable_adapters = True


def by_class(model):
    class Other(type(model.model.norm)):
        pass

    model.model.norm.__class__ = Other


CHANGES = [by_hook, by_pre_hook, by_forward, by_buffer, by_scale, by_epsilon, by_adapter]
CHANGES += [by_switch, by_class]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_that_are_neither_weights_nor_configuration_are_seen(change):
    other = models.tiny()
    change(other)
    assert differs(models.tiny(), other)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_attaching_and_reading_change_nothing(architecture):
    model, other = models.tiny(architecture), models.tiny(architecture)
    with torch.no_grad(), kvtrim.attach(model):
        model(models.prompt(40), past_key_values=kvtrim.Cache(model, "snapkv", 24, window=8))
        assert not differs(other, model)
    model.generate(models.prompt(8), max_new_tokens=4, output_hidden_states=True)
    assert not differs(other, model)


def test_rope_that_grows_with_the_text_counts_as_it_began():
    config = models.tiny().config
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config.max_position_embeddings = 32
    model = type(models.tiny())(config)
    before = fingerprint.complete(model)
    with torch.no_grad():
        model(models.prompt(60))
    assert not fingerprint.differences(before, fingerprint.complete(model))


def test_a_value_that_only_one_version_of_the_library_knows_says_nothing_there():
    here = fingerprint.complete(models.tiny())
    saved = copy.deepcopy(here)
    del saved["config"]["mlp_bias"]
    saved["attributes"]["vanished"] = "0"
    assert len(fingerprint.differences(saved, here)) == 2
    assert not fingerprint.differences(saved, here, same_library=False)
    saved["config"]["rms_norm_eps"] = 0.1
    assert fingerprint.differences(saved, here, same_library=False)


def test_weights_that_accelerate_keeps_elsewhere_count_as_well():
    accelerate = pytest.importorskip("accelerate")
    model, other = models.tiny(), models.tiny()
    accelerate.cpu_offload(other, torch.device("cpu"))
    assert next(other.parameters()).is_meta
    assert not differs(model, other)
