"""Crop is as if tokens had never been read, marks survive it, drafts leave no trace."""

import pytest
import torch

import kvtrim
import models
from kvtrim.errors import CacheError, UsageError
from models import is_attached
from small import small

pytestmark = pytest.mark.filterwarnings("ignore:keep=24 was applied to the prompt")

METHODS = ["adakv", "cake", "fastkv", "full", "h2o", "kvzip", "laprox", "shotkv", "snapkv", "tova"]
PROMPT = 30


def cache_for(model, name, keep=24, **options):
    return kvtrim.Cache(model, name, keep, **{**small(name), **options})


def feed(model, cache, ids, parts=None):
    """Logits of the last token, fed in passes of these lengths, or at once."""
    with torch.no_grad():
        for part in ids.split(parts or ids.shape[1], dim=1):
            out = model(part, past_key_values=cache).logits[:, -1]
    return out


def everything(cache):
    """All that a cache remembers, as plain values; what passes are kept for going back apart."""
    state = cache.session.state
    reading = state.reading
    found = {
        "reading": (reading.seen, reading.lengths),
        "counters": (state.due_at, state.generated, state.keeps, state.closed_up),
        "positions": [models.positions(cache, row) for row in range(len(reading.lengths))],
        "queries": [None if x.queries is None else x.queries.tolist() for x in state.layers],
        "hidden": [None if x.hidden is None else x.hidden.tolist() for x in state.layers],
        "share": [None if x.share is None else x.share.tolist() for x in state.layers],
        "carried": [x.store.has("carried") and x.store.column("carried") for x in state.layers],
        "ids": None if cache.token_ids is None else cache.token_ids.tolist(),
    }
    found["carried"] = [x if x is False else x.tolist() for x in found["carried"]]
    return found


@pytest.mark.parametrize("every", [None, 4])
@pytest.mark.parametrize("name", METHODS)
def test_cropped_tokens_have_never_been_read_or_the_crop_is_refused(llama, name, every):
    """Whether a method forgets them, refuses, or evicted nothing: never anything in between."""
    if every and (kvtrim.METHODS[name].policy.probes or name in ("full", "shotkv", "random-shot")):
        pytest.skip("evicts once")
    options = {} if every is None else {"every": every}
    ids, junk, more = (models.prompt(n, seed=n) for n in (PROMPT, 6, 5))
    refused = 0
    with kvtrim.attach(llama):
        for keep in (24, 60):
            for stay, single in [(4, False), (0, True)]:
                try:
                    cache = cache_for(llama, name, keep, **options)
                    feed(llama, cache, ids)
                    right = cache.copy()
                except kvtrim.KvtrimError:
                    pytest.skip("the method does not go with this schedule")
                feed(llama, cache, junk, 1 if single else None)
                if stay:
                    feed(llama, right, junk[:, :stay], 1 if single else None)
                before = everything(cache)
                try:
                    cache.crop(stay - 6)
                except CacheError as error:
                    refused += 1
                    assert "take a mark" in str(error)
                    assert everything(cache) == before
                    continue
                assert everything(cache) == everything(right)
                for at in range(5):
                    now = more[:, at : at + 1]
                    assert torch.equal(feed(llama, cache, now), feed(llama, right, now))
                assert everything(cache) == everything(right)
    assert refused == 0 or kvtrim.METHODS[name].schedule.every or every


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("count", [1, 10, 40])
def test_crop_on_any_model_takes_back_all_or_nothing(architecture, count):
    model, ids = models.tiny(architecture), models.prompt(90)
    with kvtrim.attach(model):
        for name in ("full", "snapkv"):
            cache = cache_for(model, name)
            feed(model, cache, ids[:, :40])
            right = cache.copy()
            feed(model, cache, ids[:, 40 : 40 + count])
            kept = cache.copy()
            cache.crop(0)
            for wrong in (-1000, -(cache.seen + 1)):
                with pytest.raises(CacheError, match="were read"):
                    cache.crop(wrong)
            try:
                cache.crop(-count)
            except CacheError:
                assert count > 32 and architecture in ("gemma2", "gemma3_text")
                right, sure = kept, cache
            else:
                sure = cache
            now = ids[:, 86:]
            got, want = feed(model, sure, now, 1), feed(model, right, now, 1)
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_everything_can_be_taken_back_even_after_evictions(llama):
    ids = models.prompt(40)
    with kvtrim.attach(llama):
        cache = cache_for(llama, "h2o")
        expected = feed(llama, cache, ids)
        feed(llama, cache, ids[:, :5])
        cache.crop(-45)
        assert cache.seen == 0 and cache.held_bytes == 0
        assert torch.equal(feed(llama, cache, ids), expected)


def test_what_is_remembered_for_going_back_is_counted_and_bounded(llama):
    with kvtrim.attach(llama):
        cache = cache_for(llama, "h2o", 400)
        feed(llama, cache, models.prompt(100))
        for _ in range(50):
            feed(llama, cache, models.prompt(1))
        past = cache.session.state.past
        assert 0 < len(past) <= 32
        bare = sum(held.nbytes for held in cache.session.state.layers)
        assert cache.held_bytes == bare + sum(each.nbytes for each in past) > bare
        cache.crop(-32)
        with pytest.raises(CacheError, match="H2O has taken them into account"):
            cache.crop(-1)


@pytest.mark.parametrize("name", ["snapkv", "full", "adakv", "h2o"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_marks_survive_crops_and_older_rewinds(name, architecture):
    model, question = models.tiny(architecture), models.prompt(3, seed=8)
    ids, other = models.prompt(50), models.prompt(10, seed=9)
    with kvtrim.attach(model):
        cache = cache_for(model, name)
        feed(model, cache, ids[:, :40])
        older = cache.mark()
        feed(model, cache, ids[:, 40:])
        newer = cache.mark()
        right = feed(model, cache, question)
        cache.rewind(older)
        older_right = feed(model, cache, question)
        held = cache.entries()

        def crop_and_feed():
            cache.crop(-2)
            feed(model, cache, other)

        def older_and_feed():
            cache.rewind(older)
            feed(model, cache, other)

        def masked():
            mask = torch.ones(1, cache.seen + 2, dtype=torch.long)
            mask[:, cache.seen - 2 : cache.seen] = 0
            with torch.no_grad():
                model(other[:, :2], attention_mask=mask, past_key_values=cache)

        for between in (lambda: cache.crop(-1), crop_and_feed, older_and_feed, masked):
            cache.rewind(newer)
            try:
                between()
            except CacheError:
                assert name == "h2o"
            cache.rewind(newer)
            assert torch.equal(feed(model, cache, question), right)
            cache.rewind(older)
            assert torch.equal(feed(model, cache, question), older_right)
            assert all(map(torch.equal, cache.entries(), held))


def test_a_mark_of_another_cache_is_refused(llama):
    with kvtrim.attach(llama):
        cache = cache_for(llama, "snapkv")
        feed(llama, cache, models.prompt(40))
        other, mark = cache.copy(), cache.mark()
        with pytest.raises(CacheError, match="another cache"):
            other.rewind(mark)


def test_an_interrupted_pass_stays_noticed(llama):
    """Marks, crops and copies do not make the layers agree."""
    cache, ids = cache_for(llama, "snapkv"), models.prompt(40)

    def stop(*_):
        raise KeyboardInterrupt

    with kvtrim.attach(llama):
        feed(llama, cache, ids)
        before = cache.mark()
        right = feed(llama, cache.copy(), ids[:, :3])
        hook = llama.model.layers[1].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            feed(llama, cache, ids[:, :3])
        hook.remove()
        for go in (
            cache.mark,
            lambda: cache.crop(-1),
            lambda: cache.crop(0),
            lambda: feed(llama, cache, ids[:, :1]),
            lambda: feed(llama, cache.copy(), ids[:, :1]),
        ):
            with pytest.raises(CacheError, match="interrupted"):
                go()
        cache.rewind(before)
        assert torch.equal(feed(llama, cache, ids[:, :3]), right)


@pytest.mark.parametrize("name", METHODS)
def test_speculative_decoding_leaves_no_trace_of_drafts(llama, name):
    """Tokens, and what is held of them, are those of decoding without drafts or are refused."""
    ids = models.prompt(12).repeat(1, 4)
    asked = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    options = {} if kvtrim.METHODS[name].schedule.every is None else {"every": 200}
    with kvtrim.attach(llama):
        alone, drafted = (cache_for(llama, name, **options) for _ in range(2))
        expected = llama.generate(ids, past_key_values=alone, **asked)
        if alone.method.propagation.narrows or alone.method.policy.probes:
            with pytest.raises(UsageError, match="leave speculative decoding out"):
                llama.generate(ids, past_key_values=drafted, prompt_lookup_num_tokens=3, **asked)
            assert drafted.seen == 0
            return
        out = llama.generate(ids, past_key_values=drafted, prompt_lookup_num_tokens=3, **asked)
        assert torch.equal(out, expected)
        assert models.positions(drafted) == models.positions(alone)


def test_drafts_are_taken_back_where_every_pass_evicts(llama):
    """A pass of which a part stays keeps what a pass over that part alone keeps."""
    ids, drafts = models.prompt(40), models.prompt(5, seed=4)
    with kvtrim.attach(llama):
        for name in ("h2o", "tova", "cake"):
            for stay in (0, 3):
                cache, right = cache_for(llama, name), cache_for(llama, name)
                for each in (cache, right):
                    feed(llama, each, ids)
                cache.activate_past_recording()
                feed(llama, cache, drafts)
                cache.crop(stay - 5)
                if stay:
                    feed(llama, right, drafts[:, :stay])
                assert models.positions(cache) == models.positions(right)
                now = feed(llama, cache, ids[:, :1])
                torch.testing.assert_close(now, feed(llama, right, ids[:, :1]))
    assert not is_attached(llama)


def test_drafts_that_evict_ahead_are_refused(llama):
    with kvtrim.attach(llama):
        cache = cache_for(llama, "streaming-llm", every=1, ahead=True)
        feed(llama, cache, models.prompt(40))
        cache.activate_past_recording()
        with pytest.raises(UsageError, match="ahead=false"):
            feed(llama, cache, models.prompt(4))
