"""Files damaged at random: one clear error each, or no harm. `mutations.py` tries more."""

import random

import pytest
import torch

import models
import mutations
from kvtrim.cache import archive
from kvtrim.errors import ModelError
from kvtrim.hf.models.load import load


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "count"), [("cache", 50), ("gguf", 25), ("weights", 12)])
def test_damaged_files_are_refused_or_harmless(tmp_path, kind, count):
    ends, wrong = mutations.search(kind, count, seed=1, folder=tmp_path)
    assert not wrong
    assert sum(ends.values()) == count and ends[mutations.REFUSED] > count // 3


def test_the_search_finds_what_it_is_for(tmp_path, monkeypatch):
    """Without the digest over the tensors, changed bytes go through, and that is noticed."""
    monkeypatch.setattr(archive, "_digest", lambda record, tensors: "always the same")
    model, paths = mutations.caches(tmp_path)
    ends = []
    for number in range(200):
        draw = random.Random(number)
        content = bytearray(paths[0].read_bytes())
        place = draw.randrange(len(content) // 2, len(content))
        content[place] ^= 64
        (tmp_path / "mutant.kv").write_bytes(content)
        ends.append(
            mutations.judged(
                lambda: mutations.continued(tmp_path / "mutant.kv", model),
                mutations.continued(paths[0], model),
            )
        )
        if ends[-1] == mutations.ACCEPTED:
            return
    pytest.fail(f"{set(ends)}")


def test_weights_that_are_not_in_the_files_are_not_made_up(tmp_path):
    model = models.tiny("llama", dtype=torch.float32)
    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    models.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no weights for model\.layers\.1\.mlp\.up_proj\.weight"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", b"\xff" * 100),
        ("config.json", b"[" * 100_000),
        ("config.json", b'{"model_type": "\\ud800"}'),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"[" * 100_000),
        ("tokenizer_config.json", b"5"),
        ("generation_config.json", b"[]"),
    ],
)
def test_a_damaged_file_of_a_model_is_one_clear_error(tmp_path, name, content):
    models.tiny("llama", dtype=torch.float32).save_pretrained(tmp_path)
    models.tokenizer().save_pretrained(tmp_path)
    assert (tmp_path / name).exists()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=r"cannot load|is a '"):
        load(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_weights_of_another_place_are_not_taken(tmp_path):
    """A reader would give a tensor whatever lies where its header points."""
    path, _ = mutations.ggufs(tmp_path)
    content = bytearray(path.read_bytes())

    def place(name):
        at = content.index(name) + len(name)
        dimensions = int.from_bytes(content[at : at + 4], "little")
        return at + 4 + 8 * dimensions + 4  # where its offset stands

    mine, other = place(b"blk.0.attn_k.weight"), place(b"blk.0.attn_v.weight")
    content[mine : mine + 8] = content[other : other + 8]
    path.write_bytes(bytes(content))
    with pytest.raises(ModelError, match=r"damaged: blk\.0\.attn_k\.weight begins at \d+, not"):
        load(path)


@pytest.mark.parametrize("place", [8, 16])
def test_counts_that_do_not_fit_into_a_file_cost_nothing(tmp_path, place):
    path, _ = mutations.ggufs(tmp_path)
    content = bytearray(path.read_bytes())
    content[place : place + 8] = (2**60).to_bytes(8, "little")
    path.write_bytes(bytes(content))
    with pytest.raises(ModelError, match="more tensors and values than fit into it"):
        load(path)
