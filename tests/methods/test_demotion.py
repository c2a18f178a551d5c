"""`demote=true`: every method's scores of structure, lowered as a loop over single scores does."""

import pytest
import torch

import kvtrim
import models
from kvtrim.engine import eviction
from kvtrim.errors import UsageError
from kvtrim.methods.demotion import demote
from kvtrim.methods.settings import find
from small import small
from views import view

KEEP = 24
ONE = {"structure": [[(3, 4), (20, 22), (30, 31)], [(9, 14), (25, 28)]], "question": [(40, 47)]}
TWO = {"structure": [[(0, 1), (5, 9), (12, 17)]], "question": [(26, 30)]}


def demotable(name):
    try:
        return bool(find(name, demote=True))
    except UsageError as error:
        assert "demote=true lowers the scores" in str(error)
        return False


METHODS = sorted(name for name in kvtrim.METHODS if demotable(name))


def lowered(scores, layer):
    """A quarter of every score of structure; of one below 0, four times as much."""
    scores = scores.clone()
    for row, spans in enumerate(layer.spans):
        ranges = [piece for unit in spans["structure"] for piece in unit]
        for head in range(scores.shape[1]):
            for slot in range(scores.shape[2]):
                place, score = int(layer.positions[row, head, slot]), scores[row, head, slot]
                if any(start <= place < end for start, end in ranges):
                    scores[row, head, slot] = score * 4 if score < 0 else score / 4
    return scores


def by_hand(patch):
    """Have the loop lower every score that a policy gives, in its place."""
    scored, rescored = eviction.checked_score, eviction.checked_rescore
    patch.setattr(
        eviction, "checked_score", lambda policy, layer: lowered(scored(policy, layer), layer)
    )
    patch.setattr(
        eviction,
        "checked_rescore",
        lambda policy, layer, _: lowered(rescored(policy, layer, scored(policy, layer)), layer),
    )


def held(model, name, ids, mask, spans, **settings):
    cache = kvtrim.Cache(model, name, KEEP, spans=spans, **{**small(name), **settings})
    with kvtrim.attach(model):
        model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=None,
        )
    return [models.positions(cache, row) for row in range(len(ids))]


def count(spans, layers):
    """How many entries of structure all heads of all layers hold."""
    inside = {at for unit in spans["structure"] for a, b in unit for at in range(a, b)}
    return sum(place in inside for layer in layers for head in layer for place in head)


def batch():
    ids, mask = models.prompt(48, rows=2), torch.ones(2, 48, dtype=torch.long)
    mask[1, :17] = 0
    return ids, mask


def test_every_method_that_evicts_by_scores_takes_it():
    left = {*kvtrim.METHODS} - {*METHODS}
    assert left == {
        name
        for name, method in kvtrim.METHODS.items()
        if method.budget.unlimited or method.propagation.restarts
    }
    assert {"kvzip", "echo", "snapkv", "knorm", "criticalkv"} <= {*METHODS}


@pytest.mark.parametrize("name", METHODS)
def test_a_padded_batch_keeps_what_the_loop_and_each_prompt_alone_keep(llama, name):
    ids, mask = batch()
    got = held(llama, name, ids, mask, [ONE, TWO], demote=True)
    with pytest.MonkeyPatch.context() as patch:
        by_hand(patch)
        assert held(llama, name, ids, mask, [ONE, TWO]) == got
    alone = held(llama, name, ids[1:, 17:], mask[1:, 17:], TWO, demote=True)
    assert alone[0] == got[1]


@pytest.mark.parametrize("name", ["knorm", "snapkv", "criticalkv", "laprox", "kvzip", "echo"])
def test_structure_holds_less_of_the_budget(llama, name):
    ids, mask = batch()
    for row, own in enumerate((ONE, TWO)):
        counts = [
            count(own, held(llama, name, ids, mask, [ONE, TWO], demote=demotes)[row])
            for demotes in (False, True)
        ]
        assert counts[1] < counts[0]


@pytest.mark.parametrize("every", [1, 3])
def test_cuts_while_generating_demote_too_and_a_file_remembers_the_parts(llama, tmp_path, every):
    ids, _ = batch()
    settings = {"demote": True, "every": every, "spans": ONE}
    cache = kvtrim.Cache(llama, "knorm", KEEP, **settings)
    with torch.no_grad(), kvtrim.attach(llama):
        llama(ids[:1], past_key_values=cache)
        cache.save(tmp_path / "cache")
        loaded = kvtrim.load_cache(tmp_path / "cache", llama)
        for step in range(7):
            for each in (cache, loaded):
                llama(torch.tensor([[9 + step]]), past_key_values=each)
    assert loaded.method.demote and models.positions(loaded) == models.positions(cache)
    plain = kvtrim.Cache(llama, "knorm", KEEP, every=every, spans=ONE)
    with torch.no_grad(), kvtrim.attach(llama), pytest.MonkeyPatch.context() as patch:
        by_hand(patch)
        llama(ids[:1], past_key_values=plain)
        for step in range(7):
            llama(torch.tensor([[9 + step]]), past_key_values=plain)
    assert models.positions(plain) == models.positions(cache)


def test_scores_above_below_and_at_zero_fall_or_stay():
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 12, 4, generator=draw)
    layer = view(keys, keys, spans=({"structure": (((2, 5),), ((9, 10),))},))
    scores = torch.randn(1, 2, 12, generator=draw)
    scores[0, 0, 2:5] = torch.tensor([0.0, -torch.inf, torch.inf])
    got = demote(scores, layer)
    assert torch.equal(got, lowered(scores, layer))
    assert bool((got <= scores).all()) and bool((got < scores).any())
    assert torch.equal(demote(scores[..., :7], layer), got[..., :7])
    unnamed = view(keys, keys, spans=({"structure": ()},))
    assert torch.equal(demote(scores, unnamed), scores)


@pytest.mark.parametrize("spans", [None, {}, {"question": [(4, 7)]}])
def test_a_prompt_that_does_not_name_its_structure_is_refused_before_it_is_read(llama, spans):
    cache = kvtrim.Cache(llama, "snapkv", KEEP, window=8, demote=True, spans=spans)
    with kvtrim.attach(llama), pytest.raises(UsageError, match="where the prompt's structure is"):
        llama(models.prompt(48), past_key_values=cache)
    assert cache.seen == 0


def test_a_text_is_read_with_its_structure_named(llama):
    tokenizer, text = models.tokenizer(chat=False), "ab, cd. ef; 1-2-3.\n" * 6
    counts = []
    for demotes in (False, True):
        cache = kvtrim.compress(llama, tokenizer, text, method="knorm", keep=40, demote=demotes)
        spans = cache.session.state.spans[0]
        counts.append(count(spans, models.positions(cache)))
    ids = tokenizer(text, add_special_tokens=False).input_ids
    named = {at for unit in spans["structure"] for a, b in unit for at in range(a, b)}
    assert [tokenizer.decode([ids[at]]) for at in sorted(named)] == list(", . ; .\n" * 6)
    assert counts[1] < counts[0]
