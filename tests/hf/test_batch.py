"""Caches that share passes go on as each would alone."""

import pytest
import torch

import kvtrim
import models
from kvtrim.errors import CacheError, NotAttachedError
from kvtrim.hf.batch import join, kind, positions
from small import small


@pytest.mark.parametrize("granularity", ["kv", "query"])
def test_joined_caches_go_on_as_each_alone(granularity):
    model = models.tiny("llama")
    names = ("snapkv", "adakv", "gemfilter", "fastkv")
    caches, alone = [], []
    for number, name in enumerate(names):
        settings = small(name) | {"granularity": granularity}
        cache = kvtrim.Cache(model, name, 24, **settings)
        with torch.no_grad(), kvtrim.attach(model):
            model(models.prompt(48 + 5 * number, number), past_key_values=cache)
        assert kind(cache)[0]
        caches.append(cache)
        alone.append(followed(model, cache.copy()))
    both = join(caches)
    assert torch.allclose(followed(model, both), torch.cat(alone), atol=1e-9)


def followed(model, cache):
    found = []
    with torch.no_grad(), kvtrim.attach(model):
        for token in (9, 17, 30):
            at = positions(cache, 1)
            ids = torch.full(at.shape, token)
            out = model(input_ids=ids, position_ids=at, past_key_values=cache)
            found.append(out.logits[:, -1])
    return torch.stack(found, dim=1)


def evicting(model):
    """Caches that evict while more is read, after prompts of different lengths."""
    chosen = [
        ("h2o", {}),
        ("tova", {}),
        ("cake", {}),
        ("streaming-llm", {"positions": "rolled"}),
        ("shotkv", {}),
        ("gemfilter", {"every": 4, "budget": "uniform"}),
        ("snapkv", {}),
    ]
    for number, (name, settings) in enumerate(chosen):
        cache = kvtrim.Cache(model, name, 24, **(small(name) | settings))
        with torch.no_grad(), kvtrim.attach(model):
            model(models.prompt(48 + 5 * number, number), past_key_values=cache)
        yield cache


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_caches_that_go_on_evicting_do_so_abreast_as_each_alone(name):
    model = models.tiny(name)
    caches = [*evicting(model)]
    assert [kind(cache)[0] for cache in caches] == [False] * 6 + [True]
    alone = [(one := cache.copy(), followed(model, one)) for cache in caches]
    both = join(caches)
    mark = both.mark()
    for chosen in ([0, 1, 2, 3, 4, 5, 6], [6, 3, 5], [1, 1]):
        both.rewind(mark)
        both.batch_select_indices(torch.tensor(chosen))
        want = torch.cat([alone[row][1] for row in chosen])
        assert torch.allclose(followed(model, both), want, atol=1e-9)
        own = zip(*(alone[row][0].entries() for row in chosen), strict=True)
        for layer, parts in zip(both.entries(), own, strict=True):
            assert torch.equal(layer, torch.cat(parts))
        assert both.held_bytes == sum(alone[row][0].held_bytes for row in chosen)
        assert both.full_bytes == sum(alone[row][0].full_bytes for row in chosen)
    assert [cache.seen for cache in caches] == [48 + 5 * number for number in range(7)]


def test_caches_abreast_are_joined_again_and_refuse_what_they_cannot(llama, tmp_path):
    caches = [*evicting(llama)]
    wider = join([join(caches[:2]), caches[2]])
    assert kind(wider) == kind(caches[0])
    assert torch.allclose(followed(llama, wider), followed(llama, join(caches[:3])), atol=1e-9)
    with pytest.raises(CacheError, match="save each of them"):
        wider.save(tmp_path / "cache")
    with pytest.raises(NotAttachedError):
        llama(input_ids=torch.tensor([[1]] * 3), past_key_values=wider)
    with pytest.raises(CacheError, match="one row without padding"), kvtrim.attach(llama):
        llama(input_ids=torch.tensor([[1], [2]]), past_key_values=wider)


def test_rows_are_taken_back_all_or_none(llama):
    caches = [*evicting(llama)]
    both = join([caches[6], caches[0]])
    followed(llama, both)
    lengths = both.lengths
    with pytest.raises(CacheError, match="cannot take back"):
        both.crop(-2)  # h2o has evicted since
    assert [row.seen for row in both.rows] == lengths
    assert both.copy().lengths == lengths
    both.reset()
    assert both.copy().seen == both.seen == 0


def test_padded_and_sliding_caches_are_not_joined(llama):
    padded = kvtrim.Cache(llama, "snapkv", 24, **small("snapkv"))
    ids, mask = models.prompt(48).repeat(2, 1), torch.ones(2, 48, dtype=torch.int64)
    mask[0, :5] = 0
    with torch.no_grad(), kvtrim.attach(llama):
        llama(ids, attention_mask=mask, past_key_values=padded)
    sliding = kvtrim.Cache(models.tiny("gemma3_text"), "snapkv", 64)
    for cache in (padded, sliding):
        assert kind(cache) is None
        with pytest.raises(CacheError, match="continue each of them alone"):
            join([cache, cache])
