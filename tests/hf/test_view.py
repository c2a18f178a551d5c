"""`kvtrim.view`: what is shown is what the store holds, of the text that was read."""

from dataclasses import replace

import pytest
import torch

import kvtrim
import models
from kvtrim.cache import archive
from kvtrim.hf.attach import attach
from kvtrim.hf.base import cache_keyword
from kvtrim.hf.view import positions, stop_of, view_file
from kvtrim.prompts.detokenizer import pieces
from small import small

TEXT = "The cat sat on the mat 🙂 and looked at the wide blue sea. " * 4


def compressed(net, method, keep=40, **how):
    return kvtrim.compress(
        net, models.tokenizer(), TEXT, method=method, keep=keep, **small(method), **how
    )


@pytest.mark.parametrize("method", ["full", "snapkv", "adakv", "h2o", "fastkv", "gemfilter"])
def test_positions_are_those_of_the_store_head_by_head(llama, method):
    cache = compressed(llama, method)
    found = positions(cache)
    assert [list(map(len, layer)) for layer in found] == [
        counts[0].tolist() for counts in cache.entries()
    ]
    for layer, store in zip(found, cache.session.state.stores(), strict=True):
        dense = store.dense()[0]["positions"]
        for head, own in enumerate(layer):
            assert own.tolist() == dense[0, head, : len(own)].tolist() == sorted(set(own.tolist()))


def test_they_are_what_select_keeps(llama):
    calls = []
    cache = kvtrim.Cache(llama, "snapkv", 40, tap=lambda index, call: calls.append(call))
    ids = torch.randint(4, 260, (1, 90))
    with torch.no_grad(), attach(llama):
        llama(input_ids=ids, **cache_keyword(cache))
    by_hand = kvtrim.select(
        "snapkv", *([getattr(c, n)[0] for c in calls] for n in ("queries", "keys", "values")),
        keep=40,
    )  # fmt: skip
    for layer, own in zip(positions(cache), by_hand, strict=True):
        assert [head.tolist() for head in layer] == [head.tolist() for head in own]


def test_the_text_is_what_was_read(llama):
    cache, tokenizer = compressed(llama, "snapkv"), models.tokenizer()
    made = kvtrim.view(cache, tokenizer, evidence="wide blue")
    assert "".join(made.pieces) == tokenizer.decode(cache.token_ids[0])
    assert len(made.pieces) == cache.seen and "🙂" in made.pieces and "" in made.pieces
    mark = made.evidence[0]
    assert "".join(made.pieces[mark.start : mark.end]) == "wide blue"
    stop = made.stops[0]
    assert (stop.method, stop.keep, stop.held_bytes) == ("snapkv", "40", cache.held_bytes)
    assert made.about == ["Question-agnostic: the document was cut before any question was known."]
    assert made._repr_html_().startswith("<iframe")


def test_several_caches_of_one_prompt_are_stops_of_one_page(llama):
    caches = [compressed(llama, "full"), *(compressed(llama, "snapkv", k) for k in (30, 60))]
    made = kvtrim.view(caches, models.tokenizer())
    assert [(stop.method, stop.keep) for stop in made.stops] == [
        ("full", "all"),
        ("snapkv", "30"),
        ("snapkv", "60"),
    ]
    other = kvtrim.compress(llama, models.tokenizer(), TEXT[1:], method="full")
    with pytest.raises(kvtrim.KvtrimError, match="different prompts"):
        kvtrim.view([caches[0], other], models.tokenizer())


def test_a_prompt_of_a_padded_batch_is_shown_as_alone(llama):
    ids = torch.randint(4, 260, (2, 60))
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    batch, alone = (kvtrim.Cache(llama, "snapkv", 40) for _ in range(2))
    with torch.no_grad(), attach(llama):
        llama(input_ids=ids, attention_mask=mask, **cache_keyword(batch))
        llama(input_ids=ids[1:, 20:], **cache_keyword(alone))
    one, two = (
        kvtrim.view(batch, models.tokenizer(), row=1),
        kvtrim.view(alone, models.tokenizer()),
    )
    assert list(one.pieces) == list(two.pieces) and one.about == []
    for a, b in zip(one.stops[0].heads, two.stops[0].heads, strict=True):
        assert a.tolist() == b.tolist()
    assert one.stops[0].held_bytes == two.stops[0].held_bytes
    assert len(batch.lengths) == 2
    with pytest.raises(kvtrim.KvtrimError, match="row is a number from 0 to 1"):
        kvtrim.view(batch, models.tokenizer(), row=2)


def test_layers_that_slide_are_said_to_be_left_out():
    net = models.tiny("gemma2")
    made = kvtrim.view(compressed(net, "snapkv"), models.tokenizer())
    assert list(made.layers) == [1, 2] and "layers 0" in made.about[-1]
    assert len(made.stops[0].positions) == 2


def test_what_cannot_be_shown_is_refused(llama):
    with pytest.raises(kvtrim.KvtrimError, match="no cache"):
        kvtrim.view([])
    with pytest.raises(kvtrim.KvtrimError, match="read no prompt"):
        kvtrim.view(kvtrim.Cache(llama, "full"), models.tokenizer())
    with pytest.raises(kvtrim.KvtrimError, match="pass its tokenizer"):
        kvtrim.view(compressed(llama, "full"))
    with pytest.raises(kvtrim.KvtrimError, match="does not stand in the document"):
        kvtrim.view(compressed(llama, "full"), models.tokenizer(), evidence="a dog")
    cache = kvtrim.Cache(llama, "full")
    with torch.no_grad(), attach(llama):
        llama(
            inputs_embeds=llama.get_input_embeddings()(torch.ones(1, 5).long()),
            **cache_keyword(cache),
        )
    with pytest.raises(kvtrim.KvtrimError, match="embeddings"):
        kvtrim.view(cache, models.tokenizer())


def test_a_model_that_kvtrim_loaded_needs_no_tokenizer(model_folder):
    net, tokenizer = kvtrim.load(model_folder)
    cache = kvtrim.compress(net, tokenizer, TEXT, method="full")
    assert "".join(kvtrim.view(cache).pieces) == tokenizer.decode(cache.token_ids[0])


def test_a_stop_of_the_full_cache_has_no_budget(llama):
    assert stop_of(compressed(llama, "full")).keep == "all"
    assert stop_of(compressed(llama, "snapkv", "25%")).keep == "25%"


def test_pieces_hold_every_character_once():
    tokenizer = models.tokenizer()
    text = "naïve 日本 🙂"
    ids = tokenizer(text).input_ids
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids) and "".join(found) == tokenizer.decode(ids)
    assert "日" in found and pieces(tokenizer, []) == []
    half = pieces(tokenizer, ids[:-1])
    assert "".join(half) == tokenizer.decode(ids[:-1])


def saved(cache, folder):
    cache.save(folder / "a.kv")
    return folder / "a.kv"


@pytest.mark.parametrize("method", ["full", "snapkv", "adakv", "gemfilter"])
def test_a_file_shows_what_its_cache_does(llama, tmp_path, method):
    cache = compressed(llama, method)
    own = kvtrim.view(cache, models.tokenizer())
    known = replace(own.stops[0], positions=())
    made = view_file(saved(cache, tmp_path), models.tokenizer(), cache.managed, known)
    assert made.html == own.html


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors["layers.1.positions"].add_(1000),
        lambda tensors: tensors["layers.1.positions"].sub_(1000),
        lambda tensors: tensors["layers.0.positions"].zero_(),
        lambda tensors: tensors["layers.0.length"].sub_(1),
        lambda tensors: tensors["layers.0.length"].neg_(),
        lambda tensors: tensors.pop("layers.2.positions"),
        lambda tensors: tensors.pop("token_ids"),
        lambda tensors: tensors.update(token_ids=tensors["token_ids"][0]),
        lambda tensors: tensors.update({"layers.0.positions": torch.zeros(2, 2)}),
        lambda tensors: tensors.update(token_ids=tensors["token_ids"][:, :0]),
    ],
)
def test_a_file_of_positions_that_no_cache_has_is_refused(llama, tmp_path, change):
    cache = compressed(llama, "snapkv")
    path = saved(cache, tmp_path)
    tensors, record = archive.read(path)
    change(tensors)
    archive.write(path, tensors, record)
    known = replace(kvtrim.view(cache, models.tokenizer()).stops[0], positions=())
    with pytest.raises(kvtrim.KvtrimError):
        view_file(path, models.tokenizer(), cache.managed, known)
