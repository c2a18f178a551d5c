"""Configurations by name: their published dimensions, and models of them with random weights."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvtrim.errors import UnknownNameError, UsageError
from kvtrim.hf.models.random import CONFIGS, build, config, published_config

# parameters, vocabulary, hidden, MLP, layers, query heads, KV heads, head size, window, RoPE base
PUBLISHED = {
    "llama-3.1-8b": (8030261248, 128256, 4096, 14336, 32, 32, 8, 128, 131072, 5e5),
    "llama-3.2-1b": (1235814400, 128256, 2048, 8192, 16, 32, 8, 64, 131072, 5e5),
    "llama-3.2-3b": (3212749824, 128256, 3072, 8192, 28, 24, 8, 128, 131072, 5e5),
    "mistral-nemo-12b": (12247782400, 131072, 5120, 14336, 40, 32, 8, 128, 131072, 1e6),
    "ministral-8b": (8019808256, 131072, 4096, 12288, 36, 32, 8, 128, 32768, 1e8),
    "qwen3-8b": (8190735360, 151936, 4096, 12288, 36, 32, 8, 128, 40960, 1e6),
    "phi-3.5-mini": (3821079552, 32064, 3072, 8192, 32, 32, 32, 96, 131072, 1e4),
    "smollm2-135m": (134515008, 49152, 576, 1536, 30, 9, 3, 64, 8192, 1e5),
}
TIED = {"llama-3.2-1b", "llama-3.2-3b", "smollm2-135m"}


def test_every_configuration_is_checked_here():
    assert set(CONFIGS) == set(PUBLISHED)
    assert all(published_config(name)["source"].count("/") == 1 for name in CONFIGS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_dimensions_are_the_published_ones(name):
    own = config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(own)
    model.tie_weights()
    found = (
        sum(parameter.numel() for parameter in model.parameters()),
        own.vocab_size,
        own.hidden_size,
        own.intermediate_size,
        own.num_hidden_layers,
        own.num_attention_heads,
        own.num_key_value_heads,
        own.head_dim,
        own.max_position_embeddings,
        own.rope_parameters["rope_theta"],
    )
    assert found == PUBLISHED[name]
    assert own.tie_word_embeddings == (name in TIED)


def test_rope_is_scaled_as_published():
    for name, factor in {"llama-3.1-8b": 8.0, "llama-3.2-1b": 32.0, "llama-3.2-3b": 32.0}.items():
        rope = config(name).rope_parameters
        assert (rope["rope_type"], rope["factor"]) == ("llama3", factor)
        assert (rope["low_freq_factor"], rope["high_freq_factor"]) == (1.0, 4.0)
        assert rope["original_max_position_embeddings"] == 8192
    rope = config("phi-3.5-mini").rope_parameters
    assert rope["rope_type"] == "longrope" and len(rope["long_factor"]) == 48
    assert rope["long_factor"][-1] == pytest.approx(64.84) and rope["short_factor"][0] == 1.0


def test_depth_and_width_shrink_in_proportion():
    whole, part = config("mistral-nemo-12b"), config("mistral-nemo-12b", layers=3, width=0.25)
    assert part.num_hidden_layers == 3 and part.num_key_value_heads == 2
    for size in ("hidden_size", "intermediate_size", "num_attention_heads"):
        assert getattr(part, size) * 4 == getattr(whole, size)
    for same in ("head_dim", "vocab_size", "rope_parameters"):
        assert getattr(part, same) == getattr(whole, same)
    assert (
        config("mistral-nemo-12b", width=2).to_dict()
        == config("mistral-nemo-12b", width=0.25).to_dict()
    )
    assert config("smollm2-135m", width=0.01).num_key_value_heads == 1


@pytest.mark.parametrize("wrong", [{"layers": 31}, {"layers": 0}, {"width": 4}, {"width": 0.0}])
def test_more_than_there_is_is_refused(wrong):
    with pytest.raises(UsageError, match="smollm2-135m"):
        config("smollm2-135m", **wrong)


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(UnknownNameError, match=r"did you mean 'llama-3.1-8b'"):
        build("lama-3.1-8b")


@pytest.mark.parametrize("name", ["smollm2-135m", "phi-3.5-mini"])
def test_a_model_is_made_once_in_its_final_format(name):
    before = torch.get_rng_state()
    model = build(name, layers=2, width=1, dtype="bfloat16", device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert model.model.layers[0].mlp.down_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == (name in TIED)
    usual = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    assert torch.equal(model.model.rotary_emb.inv_freq, usual.model.rotary_emb.inv_freq)
    again = build(name, layers=2, width=1, dtype="bfloat16", device="cpu")
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()
