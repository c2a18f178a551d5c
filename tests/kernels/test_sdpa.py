"""The fast attention equals the slow one on random ragged shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtrim.cache.store import LayerStore
from kvtrim.errors import UnknownNameError
from kvtrim.kernels import reference, sdpa
from kvtrim.kernels.attend import attend, require_known
from runs import flat_runs


def ragged(draw, rows, kv_heads, least):
    """Flat keys and values, starts and lengths of runs in any order with gaps between them."""
    count = rows * kv_heads
    lengths = [draw(st.integers(least, 20)) for _ in range(count)]
    if draw(st.booleans()):
        lengths[draw(st.integers(0, count - 1))] += 400  # one head far longer than the rest
    order = draw(st.permutations(range(count)))
    start, at = [0] * count, 0
    for head in order:
        start[head] = at
        at += lengths[head] + draw(st.integers(0, 5))
    flat = torch.randn(at + 1, 2, 8, dtype=torch.float64)
    runs = torch.tensor([start, lengths]).view(2, rows, kv_heads)
    return flat[:, 0], flat[:, 1], runs[0], runs[1]


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_ragged_attention_equals_the_reference(data):
    draw = data.draw
    rows, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    group, count = draw(st.sampled_from([1, 3, 4, 8])), draw(st.integers(1, 5))
    keys, values, start, length = ragged(draw, rows, kv_heads, least=count)
    queries = torch.randn(rows, kv_heads * group, count, 8, dtype=torch.float64)
    softcap = draw(st.sampled_from([None, 5.0]))
    bias = draw(st.sampled_from([None, torch.randn(len(keys))]))
    got = sdpa.ragged(queries, keys, values, start, length, 0.3, softcap, bias)
    want = reference.ragged(queries, keys, values, start, length, 0.3, softcap, bias)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("lengths", [[7, 7, 30, 9], [5, 6, 7, 8]])
def test_half_formats_on_a_cpu_round_nothing_but_the_result(lengths, softcap):
    keys, values, *runs = flat_runs(2, 2, lengths, width=8)
    queries = torch.randn(2, 4, 1, 8).bfloat16()
    keys, values = keys.bfloat16(), values.bfloat16()
    got = sdpa.ragged(queries, keys, values, *runs, 0.3, softcap)
    wide = (each.float() for each in (queries, keys, values))
    want = sdpa.ragged(*wide, *runs, 0.3, softcap).bfloat16()
    torch.testing.assert_close(got, want, rtol=2**-8, atol=1e-6)  # a last bit where sums differ


def reference_of(queries, keys, values, softcap):
    rows, kv_heads, slots = keys.shape[:3]
    length = torch.full((rows, kv_heads), slots)
    start = torch.arange(rows * kv_heads).view(rows, kv_heads) * slots
    flat = (x.flatten(0, 2) for x in (keys, values))
    return reference.ragged(queries, *flat, start, length, 0.3, softcap)


def test_many_queries_go_in_blocks_and_make_no_mask_of_all_pairs(monkeypatch):
    queries = torch.randn(2, 6, 11, 8, dtype=torch.float64)
    keys, values = torch.randn(2, 2, 2, 31, 8, dtype=torch.float64)
    masks = []
    mixed = sdpa._mix
    monkeypatch.setattr(sdpa, "_ROWS_AT_ONCE", 4)
    monkeypatch.setattr(
        sdpa, "_mix", lambda *given: masks.append(tuple(given[3].shape)) or mixed(*given)
    )
    for softcap in (None, 5.0):
        whole = reference_of(queries, keys, values, softcap)
        masks.clear()
        torch.testing.assert_close(sdpa.dense(queries, keys, values, 0.3, softcap), whole)
        assert masks == [(12, 24), (12, 28), (9, 31)]


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_queries_of_chosen_tokens_see_what_stands_before_them(softcap):
    queries = torch.randn(2, 6, 31, 8, dtype=torch.float64)
    keys, values = torch.randn(2, 2, 2, 31, 8, dtype=torch.float64)
    chosen = torch.tensor([0, 3, 4, 17, 29, 30])
    got = sdpa.up_to(queries[:, :, chosen], keys, values, chosen, 0.3, softcap)
    torch.testing.assert_close(got, reference_of(queries, keys, values, softcap)[:, :, chosen])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_uniform_attention_equals_the_reference(data):
    draw = data.draw
    rows, kv_heads, before = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.integers(0, 30)),
    )
    group, count = draw(st.sampled_from([1, 3, 4])), draw(st.integers(1, 9))
    queries = torch.randn(rows, kv_heads * group, count, 8, dtype=torch.float64)
    keys = torch.randn(rows, kv_heads, before + count, 8, dtype=torch.float64)
    values = torch.randn(rows, kv_heads, before + count, 5, dtype=torch.float64)
    positions = torch.arange(before + count).int().expand(1, 1, -1)
    store = LayerStore.borrow({"keys": keys, "values": values, "positions": positions})
    if before and draw(st.booleans()):  # what is read now has none
        bias = torch.randn(rows, kv_heads, before + count)
        bias[..., before:] = 0
        store.add_column("bias")
        store.set_column("bias", bias)
    for softcap in (None, 5.0):
        fast = attend(queries, store, 0.4, softcap)
        slow = attend(queries, LayerStore.borrow(store.borrowed), 0.4, softcap, impl="reference")
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)


def test_a_long_capped_prompt_goes_in_blocks(monkeypatch):
    monkeypatch.setattr(sdpa, "_ROWS_AT_ONCE", 7)
    queries, keys = torch.randn(1, 4, 30, 8), torch.randn(1, 2, 30, 8)
    blocked = sdpa.causal(queries, keys, keys, 0.3, 4.0)
    monkeypatch.undo()
    torch.testing.assert_close(blocked, sdpa.causal(queries, keys, keys, 0.3, 4.0))


def test_the_reference_gives_zeros_to_a_query_that_sees_nothing():
    none = torch.zeros(1, 1, dtype=torch.int64)
    ones = torch.ones(3, 4)
    out = reference.ragged(torch.ones(1, 2, 1, 4), ones, ones, none, none, 1.0)
    assert torch.equal(out, torch.zeros(1, 2, 1, 4))


def test_an_unknown_implementation_is_refused():
    with pytest.raises(UnknownNameError, match="did you mean 'sdpa'"):
        require_known("spda")


def test_neighbours_of_one_length_go_in_one_call(monkeypatch):
    calls, step = [], sdpa._one_step
    monkeypatch.setattr(
        sdpa, "_one_step", lambda q, *rest: calls.append(q.shape[0]) or step(q, *rest)
    )
    keys, values, start, length = flat_runs(3, 2, [9, 9, 9, 4, 4, 7], width=8)
    queries = torch.randn(3, 4, 1, 8, dtype=torch.float64)
    got = sdpa.ragged(queries, keys, values, start, length, 0.3)
    assert calls == [3, 2, 1]
    torch.testing.assert_close(got, reference.ragged(queries, keys, values, start, length, 0.3))
    pointers = {run.of(keys).untyped_storage().data_ptr() for run in sdpa._buckets([0], [9])}
    assert pointers == {keys.untyped_storage().data_ptr()}


def test_where_torch_needs_no_mask_new_tokens_see_the_same(monkeypatch):
    queries = torch.randn(2, 6, 7, 16)
    keys, values = torch.randn(2, 2, 2, 20, 16)
    want = sdpa.dense(queries, keys, values, 0.3)
    monkeypatch.setattr(sdpa, "_flash", lambda *_: True)
    got = sdpa.dense(queries, keys, values, 0.3)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
