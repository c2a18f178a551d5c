"""The cache as an object: bytes, marks, crops, copies, and being told apart."""

import copy

import pytest
import torch
from transformers import DynamicCache

import kvtrim
import models
from kvtrim.errors import BudgetError, CacheError, NotAttachedError, UsageError

K, D, LAYERS = 2, 8, 3


def cache_for(model, name="snapkv", keep=24, **options):
    if name not in ("full", "tova", "h2o"):
        options.setdefault("window", 8)
    return kvtrim.Cache(model, name, keep, **options)


def read(model, cache, ids):
    with torch.no_grad(), kvtrim.attach(model):
        return model(ids, past_key_values=cache).logits


def test_held_bytes_are_entries_times_their_size(llama):
    cache = cache_for(llama)
    read(llama, cache, models.prompt(48))
    entry = 2 * D * torch.float64.itemsize + torch.int32.itemsize
    assert cache.held_bytes == LAYERS * K * 24 * entry
    assert cache.full_bytes == LAYERS * K * 48 * 2 * D * torch.float64.itemsize


def test_full_bytes_are_what_transformers_holds(any_model):
    ids = models.prompt(48)
    cache, stock = cache_for(any_model), DynamicCache(config=any_model.config)
    read(any_model, cache, ids)
    with torch.no_grad():
        any_model(ids, past_key_values=stock)
    assert cache.full_bytes == sum(
        layer.keys.nbytes + layer.values.nbytes for layer in stock.layers
    )


def test_per_head_budgets_free_the_memory_they_save(llama):
    ids = models.prompt(48)
    uniform, ragged = cache_for(llama), cache_for(llama, "adakv")
    read(llama, uniform, ids)
    read(llama, ragged, ids)
    assert len({int(n) for counts in ragged.entries() for n in counts.flatten()}) > 1
    assert ragged.held_bytes == pytest.approx(uniform.held_bytes, rel=0.03)
    storage = sum(
        b.untyped_storage().nbytes()
        for s in ragged.session.state.stores()
        for b in s.buffers.values()
    )
    assert storage == ragged.held_bytes


@pytest.mark.parametrize("name", ["knorm", "ada-curdkv"])
def test_slots_freed_by_a_later_cut_are_given_back(llama, name):
    """A turn of 400 tokens is cut back to 40 entries, and so is what was allocated for it."""
    ids, cache = models.prompt(460), kvtrim.Cache(llama, name, 40, every=400)
    read(llama, cache, ids[:, :60])
    read(llama, cache, ids[:, 60:459])
    assert cache.held_bytes > LAYERS * K * 400 * 2 * D * torch.float64.itemsize
    read(llama, cache, ids[:, 459:])
    held = [len(head) for layer in models.positions(cache) for head in layer]
    assert sum(held) <= 40 * len(held) + len(held)
    slack = 2 * sum(max(16, count // 16) for count in held)
    entry = 2 * D * torch.float64.itemsize + torch.int32.itemsize
    assert cache.held_bytes <= (sum(held) + slack) * entry
    storage = [
        b.untyped_storage().nbytes()
        for s in cache.session.state.stores()
        for b in s.buffers.values()
    ]
    assert sum(storage) == cache.held_bytes


@pytest.mark.parametrize(
    ("name", "count"), [("snapkv", 8), ("tova", 1), ("cake", 1), ("knorm", 0)]
)
def test_held_bytes_count_what_is_remembered_beside_entries(llama, name, count):
    """Queries that later cuts ask for, and no more of them than these need."""
    window = {"window": 8} if name in ("snapkv", "cake") else {}
    cache = kvtrim.Cache(llama, name, 24, every=1, **window)
    read(llama, cache, models.prompt(48))
    for _ in range(3):
        entries = sum(b.nbytes for s in cache.session.state.stores() for b in s.buffers.values())
        remembered = LAYERS * 6 * count * D * torch.float64.itemsize
        assert cache.held_bytes - entries == remembered
        read(llama, cache, models.prompt(1))


@pytest.mark.parametrize("name", ["snapkv", "cake", "tova", "h2o"])
def test_a_size_is_that_of_the_whole_cache(llama, name):
    """Remembered queries and carried statistics are paid for too; slack for appends is not."""
    window = {"window": 8} if name in ("snapkv", "cake") else {}
    cache = kvtrim.Cache(llama, name, "24KiB", every=1, **window)
    read(llama, cache, models.prompt(300))
    state = cache.session.state
    slack = sum(
        int((s.capacity - s.length).sum()) * sum(b[0].nbytes for b in s.buffers.values())
        for s in state.stores()
    )
    assert 0.93 * 24 * 1024 < cache.held_bytes - slack <= 24 * 1024


def test_query_head_presets_pay_for_what_they_store(llama):
    ids = models.prompt(48)
    own, upstream = cache_for(llama), cache_for(llama, preset="upstream")
    read(llama, own, ids)
    read(llama, upstream, ids)
    assert upstream.held_bytes == 3 * own.held_bytes
    assert upstream.full_bytes == own.full_bytes


def test_slack_for_appends_is_bounded_and_counted(llama):
    cache = cache_for(llama, "adakv")
    read(llama, cache, models.prompt(48))
    entry = 2 * D * torch.float64.itemsize + torch.int32.itemsize
    for _ in range(40):
        read(llama, cache, models.prompt(1))
        used = sum(int(counts.sum()) for counts in cache.entries()) * entry
        assert used <= cache.held_bytes <= used + LAYERS * K * 16 * entry


@pytest.mark.parametrize(
    ("keep", "entries"), [(24, 24), (0.5, 24), ("25%", 12), (f"{LAYERS * K * 20 * 132}B", 20)]
)
def test_keep_is_tokens_a_share_or_bytes(llama, keep, entries):
    cache = cache_for(llama, keep=keep)
    read(llama, cache, models.prompt(48))
    assert {int(n) for counts in cache.entries() for n in counts.flatten()} == {entries}


def test_a_budget_below_the_window_is_refused_before_any_work(llama):
    with pytest.raises(BudgetError, match="Use keep=9 or more"):
        cache_for(llama, keep=8)
    with pytest.raises(BudgetError, match="keeps nothing"):
        cache_for(llama, keep=0)
    with pytest.raises(BudgetError, match="more than the whole prompt"):
        cache_for(llama, keep=1.5)
    with pytest.raises(BudgetError, match="not a budget"):
        cache_for(llama, keep="lots")


def test_a_model_that_is_not_attached_is_refused(llama):
    with pytest.raises(NotAttachedError, match=r"kvtrim\.attach"), torch.no_grad():
        llama(models.prompt(8), past_key_values=cache_for(llama))


def test_a_cache_of_another_model_is_refused(llama):
    other = models.tiny("llama", seed=3)
    with pytest.raises(CacheError, match="another model"):
        read(other, cache_for(llama), models.prompt(8))


def test_another_number_of_prompts_is_refused(llama):
    cache = cache_for(llama)
    read(llama, cache, models.prompt(48))
    with pytest.raises(UsageError, match="holds 1 prompts, the input has 2"):
        read(llama, cache, models.prompt(1, rows=2))


def test_a_prepared_mask_is_refused(llama):
    with (
        torch.no_grad(),
        kvtrim.attach(llama),
        pytest.raises(UsageError, match="2-D attention mask"),
    ):
        llama(
            models.prompt(4),
            attention_mask=torch.zeros(1, 1, 4, 4, dtype=torch.float64),
            past_key_values=cache_for(llama),
        )


def test_crop_takes_back_what_was_appended_and_no_more(llama):
    cache = cache_for(llama, "adakv")
    read(llama, cache, models.prompt(48))
    before = read(llama, cache.copy(), models.prompt(3, seed=4))
    read(llama, cache, models.prompt(5, seed=9))
    cache.crop(-5)
    assert cache.seen == 48
    assert torch.equal(read(llama, cache, models.prompt(3, seed=4)), before)
    with pytest.raises(CacheError, match="entries were evicted 3 tokens ago"):
        cache.crop(-4)
    with pytest.raises(UsageError, match="negative"):
        cache.crop(4)


def test_crop_may_reach_into_a_prompt_of_which_nothing_was_evicted(llama):
    cache, shorter = cache_for(llama, keep=100), cache_for(llama, keep=100)
    read(llama, cache, models.prompt(48))
    cache.crop(-20)
    read(llama, shorter, models.prompt(48)[:, :28])
    torch.testing.assert_close(
        read(llama, cache, models.prompt(2)),
        read(llama, shorter, models.prompt(2)),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize("name", ["snapkv", "adakv", "h2o", "tova", "full"])
def test_rewind_returns_to_the_mark_again_and_again(llama, name):
    cache = cache_for(llama, name)
    read(llama, cache, models.prompt(48))
    mark, question = cache.mark(), models.prompt(6, seed=5)
    first = read(llama, cache, question)
    for _ in range(2):
        read(llama, cache, models.prompt(15, seed=6))
        cache.rewind(mark)
        assert torch.equal(read(llama, cache, question), first)
        assert cache.seen == 54
    cache.rewind(mark)
    assert cache.token_ids.shape == (1, 48)


@pytest.mark.parametrize("name", ["snapkv", "h2o"])
def test_an_interrupted_pass_is_noticed_and_can_be_rewound(llama, name):
    cache = cache_for(llama, name)
    read(llama, cache, models.prompt(48))
    mark, question = cache.mark(), models.prompt(6, seed=5)
    expected = read(llama, cache.copy(), question)

    def stop(*_):
        raise KeyboardInterrupt

    hook = llama.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        read(llama, cache, question)
    hook.remove()
    with pytest.raises(CacheError, match="interrupted"):
        read(llama, cache, question)
    cache.rewind(mark)
    assert torch.equal(read(llama, cache, question), expected)


@pytest.mark.parametrize("make", [lambda cache: cache.copy(), copy.deepcopy])
def test_a_copy_goes_its_own_way(llama, make):
    cache = cache_for(llama, "adakv")
    read(llama, cache, models.prompt(48))
    other = make(cache)
    first = read(llama, other, models.prompt(9, seed=2))
    assert cache.seen == 48 and other.seen == 57
    assert torch.equal(read(llama, cache, models.prompt(9, seed=2)), first)


def test_prompts_can_be_selected_and_repeated(llama):
    ids = models.prompt(48, rows=3)
    batch = cache_for(llama, "adakv")
    read(llama, batch, ids)
    batch.batch_select_indices(torch.tensor([2, 0]))
    alone = cache_for(llama, "adakv")
    read(llama, alone, ids[2:])
    step = models.prompt(1, seed=3)
    expected = read(llama, alone, step)
    torch.testing.assert_close(
        read(llama, batch, step.expand(2, 1))[:1], expected, rtol=1e-9, atol=1e-9
    )
    assert torch.equal(batch.token_ids[0, :48], ids[2])
    batch.batch_repeat_interleave(2)
    assert batch.token_ids.shape[0] == 4


def test_reset_makes_it_new(llama):
    cache, ids = cache_for(llama), models.prompt(48)
    first = read(llama, cache, ids)
    cache.reset()
    assert cache.seen == 0 and cache.held_bytes == 0 and cache.entries() == []
    assert torch.equal(read(llama, cache, ids), first)


def test_a_reset_forgets_how_long_the_prompt_was(llama):
    cache, ids = cache_for(llama), models.prompt(60)
    with kvtrim.attach(llama):
        llama.generate(ids, past_key_values=cache, max_new_tokens=2, prefill_chunk_size=16)
    for forget in (cache.reset, lambda: cache.crop(-cache.seen)):
        forget()
        read(llama, cache, ids[:, :40])
        fresh = cache_for(llama)
        read(llama, fresh, ids[:, :40])
        assert models.positions(cache) == models.positions(fresh)
        assert max(map(len, models.positions(cache)[0])) < 40


def test_embeddings_instead_of_tokens_are_read_without_token_ids(llama):
    cache, ids = cache_for(llama), models.prompt(48)
    with torch.no_grad(), kvtrim.attach(llama):
        llama(inputs_embeds=llama.get_input_embeddings()(ids), past_key_values=cache)
    assert cache.seen == 48 and cache.token_ids is None
