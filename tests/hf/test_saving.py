"""A saved cache goes on as if it had never left memory, and a wrong or damaged file is refused."""

import hashlib
import json
import os
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import kvtrim
import models
from kvtrim.cache import archive
from kvtrim.errors import CacheError, CacheFileError
from small import small

METHODS = sorted(kvtrim.METHODS)


def filled(model, name="snapkv", length=48, **options):
    cache = kvtrim.Cache(model, name, 24, **small(name), **options)
    with torch.no_grad(), kvtrim.attach(model):
        model(models.prompt(length), past_key_values=cache)
    return cache


def go_on(model, cache, steps=8):
    token, logits = torch.tensor([[9]]), []
    with torch.no_grad(), kvtrim.attach(model):
        for _ in range(steps):
            logits.append(model(token, past_key_values=cache).logits[:, -1])
            token = logits[-1].argmax(-1, keepdim=True)
    return torch.cat(logits)


@pytest.mark.parametrize("name", METHODS)
def test_saved_and_loaded_equals_not_saved(llama, name, tmp_path):
    cache = filled(llama, name)
    cache.save(tmp_path / "x.kv", models.tokenizer())
    loaded = kvtrim.load_cache(tmp_path / "x.kv", llama, models.tokenizer())
    assert loaded.seen == cache.seen
    assert loaded.held_bytes <= cache.held_bytes
    assert loaded.full_bytes == cache.full_bytes
    assert torch.equal(loaded.token_ids, cache.token_ids)
    assert torch.equal(go_on(llama, loaded), go_on(llama, cache))
    assert [c.tolist() for c in loaded.entries()] == [c.tolist() for c in cache.entries()]


@pytest.mark.parametrize("architecture", ["gemma3_text", "qwen3"])
def test_sliding_layers_are_saved_too(architecture, tmp_path):
    model = models.tiny(architecture)
    cache = filled(model)
    cache.save(tmp_path / "x.kv")
    assert torch.equal(
        go_on(model, kvtrim.load_cache(tmp_path / "x.kv", model)), go_on(model, cache)
    )


def test_an_evicting_schedule_goes_on_evicting(llama, tmp_path):
    cache = filled(llama, "adakv", schedule="every-4")
    cache.save(tmp_path / "x.kv")
    loaded = kvtrim.load_cache(tmp_path / "x.kv", llama)
    assert loaded.method == cache.method
    assert torch.equal(go_on(llama, loaded, 20), go_on(llama, cache, 20))


def test_another_model_is_refused_with_the_difference(llama, tmp_path):
    filled(llama).save(tmp_path / "x.kv", models.tokenizer())
    with pytest.raises(CacheFileError, match=r"another model: weights: \w+ saved, \w+ here"):
        kvtrim.load_cache(tmp_path / "x.kv", models.tiny("llama", seed=1))
    with pytest.raises(CacheFileError, match="architecture: llama saved, qwen2 here"):
        kvtrim.load_cache(tmp_path / "x.kv", models.tiny("qwen2"))
    with pytest.raises(CacheFileError, match="dtype: float64 saved, float32 here"):
        kvtrim.load_cache(tmp_path / "x.kv", models.tiny("llama", dtype=torch.float32))
    with pytest.raises(CacheFileError, match="another tokenizer"):
        kvtrim.load_cache(tmp_path / "x.kv", llama, models.tokenizer(chat=False))
    other = models.tiny("llama")
    other.config.rope_parameters = {**other.config.rope_parameters, "rope_theta": 5.0}
    with pytest.raises(CacheFileError, match="rope"):
        kvtrim.load_cache(tmp_path / "x.kv", other)


def test_a_file_of_something_else_is_refused(llama, tmp_path):
    with pytest.raises(CacheFileError, match="no such cache file"):
        kvtrim.load_cache(tmp_path / "none.kv", llama)
    (tmp_path / "text.kv").write_text("hello")
    with pytest.raises(CacheFileError, match="no cache file"):
        kvtrim.load_cache(tmp_path / "text.kv", llama)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.kv")
    with pytest.raises(CacheFileError, match="kvtrim did not write it"):
        kvtrim.load_cache(tmp_path / "other.kv", llama)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = models.tiny("llama")
    path = tmp_path_factory.mktemp("saved") / "x.kv"
    filled(model, "adakv").save(path)
    return model, path


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_truncated_file_is_refused(saved, data):
    model, path = saved
    whole = path.read_bytes()
    cut = path.with_name("cut.kv")
    cut.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(CacheFileError):
        kvtrim.load_cache(cut, model)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_file_with_a_changed_byte_is_refused(saved, data):
    model, path = saved
    whole = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    changed = path.with_name("changed.kv")
    changed.write_bytes(bytes(whole))
    try:
        kvtrim.load_cache(changed, model)
    except CacheFileError:
        return
    # only padding of the header may change without changing what was saved
    assert archive.read(changed)[1] == archive.read(path)[1]
    assert all(
        torch.equal(a, b)
        for a, b in zip(*(archive.read(p)[0].values() for p in (changed, path)), strict=True)
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda t, r: t["layers.0.length"].add_(1),
        lambda t, r: t["layers.1.positions"].fill_(1000),
        lambda t, r: t.pop("layers.2.keys"),
        lambda t, r: r["session"].pop("seen"),
        lambda t, r: r["session"].update(keeps=3),
        lambda t, r: r.update(format=99),
        lambda t, r: r.update(method="nothing"),
        lambda t, r: t.update({"layers.0.values": t["layers.0.values"][:, None]}),
    ],
)
def test_contradictions_in_a_file_with_a_valid_checksum_are_refused(saved, tmp_path, damage):
    model, path = saved
    tensors, record = archive.read(path)
    damage(tensors, record)
    archive.write(tmp_path / "y.kv", tensors, record)
    with pytest.raises(kvtrim.KvtrimError):
        kvtrim.load_cache(tmp_path / "y.kv", model)


def test_a_failed_write_leaves_the_old_file_and_no_debris(llama, tmp_path, monkeypatch):
    path = tmp_path / "x.kv"
    path.write_text("precious")

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(archive, "save_file", fails)
    with pytest.raises(CacheFileError, match=r"cannot write .*x\.kv: disk full"):
        filled(llama).save(path)
    assert path.read_text() == "precious"
    assert os.listdir(tmp_path) == ["x.kv"]
    with pytest.raises(CacheFileError, match="cannot write"):
        filled(llama).save(tmp_path / "nowhere" / "x.kv")


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A module with a method of its own, which leaves a trace when it is imported."""
    trace = tmp_path / "imported"
    lines = [
        f"open({str(trace)!r}, 'w').close()",
        "import kvtrim",
        "MINE = kvtrim.METHODS['snapkv']",
    ]
    (tmp_path / "outside_method.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "outside_method:MINE", trace
    sys.modules.pop("outside_method", None)


def test_a_file_never_decides_what_is_imported(saved, tmp_path, outside):
    model, path = saved
    name, trace = outside
    tensors, record = archive.read(path)
    archive.write(tmp_path / "y.kv", tensors, record | {"method": name})
    with pytest.raises(CacheFileError, match="does not decide what is imported: pass method="):
        kvtrim.load_cache(tmp_path / "y.kv", model)
    assert not trace.exists()


@pytest.mark.parametrize("place", ["policy", "budget", "unit", "schedule", "propagation", "table"])
def test_no_setting_of_a_file_imports_anything(saved, tmp_path, outside, place):
    model, path = saved
    name, trace = outside
    tensors, record = archive.read(path)
    archive.write(tmp_path / "y.kv", tensors, record | {"settings": {place: name}})
    with pytest.raises(kvtrim.KvtrimError):
        kvtrim.load_cache(tmp_path / "y.kv", model)
    assert not trace.exists()


def test_the_caller_names_a_method_of_their_own(llama, tmp_path, outside):
    name, _ = outside
    cache = kvtrim.Cache(llama, name, 24, window=8)
    with torch.no_grad(), kvtrim.attach(llama):
        llama(models.prompt(48), past_key_values=cache)
    cache.save(tmp_path / "x.kv")
    with pytest.raises(CacheFileError, match="pass method='outside_method:MINE'"):
        kvtrim.load_cache(tmp_path / "x.kv", llama)
    with pytest.raises(CacheFileError, match="made with the method 'outside_method:MINE', not"):
        kvtrim.load_cache(tmp_path / "x.kv", llama, method="knorm")
    for method in (name, kvtrim.METHODS["snapkv"]):
        loaded = kvtrim.load_cache(tmp_path / "x.kv", llama, method=method)
        assert torch.equal(go_on(llama, loaded), go_on(llama, cache.copy()))


def test_a_file_of_version_0_1_is_refused_with_the_remedy(llama, tmp_path):
    record = {"format": 1, "versions": {"kvtrim": "0.1.0"}, "method": "snapkv"}
    save_file({"a": torch.zeros(1)}, tmp_path / "x.kv", {"kvtrim": json.dumps(record)})
    with pytest.raises(CacheFileError, match=r"kvtrim 0\.1\.0 in format 1.*compress the document"):
        kvtrim.load_cache(tmp_path / "x.kv", llama)


def swollen(path, tensors, record):
    """A file of 20 GiB, nearly all of it a hole, that lists its tensors truly."""
    count = 5 * 2**30
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    name = max((n for n in header if n.endswith("keys")), key=lambda n: header[n]["data_offsets"])
    table = {key: [str(t.dtype), list(t.shape)] for key, t in tensors.items()}
    grown = 0
    for key in sorted(header.keys() - {"__metadata__"}, key=lambda n: header[n]["data_offsets"]):
        start, end = (at + grown for at in header[key]["data_offsets"])
        if key == name:
            header[key] |= {"dtype": "F32", "shape": [count // 8, 8]}
            table[key] = ["torch.float32", [count // 8, 8]]
            grown += 4 * count - (end - start)
            end = start + 4 * count
        header[key]["data_offsets"] = [start, end]
    text = json.dumps(record | {"tensors": table}, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    header["__metadata__"] |= {"kvtrim": text, "record_sha256": digest}
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(
            8 + len(raw) + max(v["data_offsets"][1] for v in header.values() if "shape" in v)
        )


def test_a_file_is_known_to_be_too_large_before_it_is_read(saved, tmp_path, monkeypatch):
    model, path = saved
    big = tmp_path / "big.kv"
    big.write_bytes(path.read_bytes())
    swollen(big, *archive.read(path))
    assert big.stat().st_size > 20 * 2**30
    monkeypatch.setattr(archive.Archive, "read", lambda _: pytest.fail("it was read"))
    with pytest.raises(CacheFileError, match="holds what no cache of this model does: layers"):
        kvtrim.load_cache(big, model)
    os.truncate(big, 2**36)  # its header no longer fits
    with pytest.raises(CacheFileError, match="no cache file"):
        kvtrim.load_cache(big, model)


def test_a_file_larger_than_memory_is_not_read(saved, monkeypatch):
    model, path = saved
    monkeypatch.setattr(archive, "_memory", lambda: 1000)
    with pytest.raises(CacheFileError, match="GiB of memory"):
        kvtrim.load_cache(path, model)


def test_an_empty_cache_and_a_nameless_method_cannot_be_saved(llama, tmp_path):
    with pytest.raises(CacheError, match="nothing to save"):
        kvtrim.Cache(llama, "snapkv", 24, window=8).save(tmp_path / "x.kv")
    unnamed = kvtrim.Cache(llama, kvtrim.METHODS["knorm"], 24)
    with torch.no_grad(), kvtrim.attach(llama):
        llama(models.prompt(40), past_key_values=unnamed)
    with pytest.raises(CacheError, match="pass a name"):
        unnamed.save(tmp_path / "x.kv")


def test_the_file_says_what_it_is(llama, tmp_path):
    filled(llama).save(tmp_path / "x.kv")
    with safe_open(tmp_path / "x.kv", "pt") as file:
        record = json.loads(file.metadata()["kvtrim"])
    assert record["method"] == "snapkv"
    assert record["keep"] == ["tokens", 24]
    assert record["settings"] == {"window": 8}
    assert record["session"]["seen"] == 48
    assert record["model"]["architecture"] == "llama"
