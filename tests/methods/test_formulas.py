"""Scores against plain formulas, and the worked examples of the specifications."""

import itertools

import pytest
import torch

import kvtrim
import oracles
from kvtrim.methods.policies import ops
from kvtrim.methods.policies.h2o import H2O
from kvtrim.methods.policies.snapkv import SnapKV
from kvtrim.methods.policies.tova import Tova
from views import view

H, K, D, N = 6, 2, 8, 40


@pytest.fixture
def qk():
    draw = torch.Generator().manual_seed(3)
    return torch.randn(H, N, D, generator=draw), torch.randn(K, N, D, generator=draw)


def zeros(n, heads=1):
    return torch.zeros(heads, n, 4), torch.zeros(heads, n, 4)


def test_window_attention_equals_the_loops(qk):
    want = oracles.window_weights(*qk, 7, D**-0.5).float()
    torch.testing.assert_close(ops.attention(view(*qk), last=7)[0], want, rtol=1e-5, atol=1e-6)


def test_window_attention_with_a_softcap(qk):
    q, k = qk
    got = ops.attention(view(q, k, softcap=0.5), last=1)[0, :, 0]
    for h in range(H):
        logits = torch.tanh(k[h // 3] @ q[h, -1] * D**-0.5 / 0.5) * 0.5
        torch.testing.assert_close(got[h], logits.softmax(0))


def test_column_sums_equal_the_dense_matrix_whatever_the_block(qk, monkeypatch):
    want = oracles.column_sums(*qk, D**-0.5).float()
    for block in (1, 7, 40, 256):
        monkeypatch.setattr(ops, "_rows_at_once", lambda layer, block=block: block)
        torch.testing.assert_close(ops.column_sums(view(*qk))[0], want, rtol=1e-5, atol=1e-5)


def test_column_sums_over_the_last_queries_only(qk):
    q, k = qk
    dense = oracles.window_weights(q, k, 9, D**-0.5).float().sum(1)
    torch.testing.assert_close(ops.column_sums(view(q[:, -9:], k))[0], dense, rtol=1e-5, atol=1e-5)


def test_heads_of_different_length_see_their_own_slots_only(qk):
    q, k = qk
    lengths = torch.tensor([[40, 25]])
    garbage = k.clone()
    garbage[1, 25:] = torch.nan
    garbage = garbage.nan_to_num(1e4)
    got = ops.attention(view(q, garbage, lengths=lengths), last=2)[0]
    own = q[3:, -2:]
    want = torch.zeros(3, 2, 25)
    for h, i in itertools.product(range(3), range(2)):
        logits = k[1, : 24 + i] @ own[h, i] * D**-0.5
        want[h, i, : 24 + i] = logits.softmax(0)
    torch.testing.assert_close(got[3:, :, :25], want, rtol=1e-5, atol=1e-6)
    assert float(got[3:, :, 25:].abs().max()) == 0
    sums = ops.column_sums(view(q[:, -2:], garbage, lengths=lengths))[0]
    torch.testing.assert_close(sums[3:, :25], want.sum(1), rtol=1e-5, atol=1e-6)


def test_zero_queries_attend_evenly():
    q, k = zeros(10)
    votes = SnapKV(window=3, kernel=1).score(view(q, k))
    torch.testing.assert_close(votes, torch.full((1, 1, 7), 1 / 8 + 1 / 9 + 1 / 10))


def test_average_pooling_commutes_with_the_group_sum_and_maximum_pooling_does_not():
    a = torch.tensor([[[1.0, 0, 0, 4], [0, 3, 0, 0]]])

    def pooled_then_summed(how):
        return ops.reduce_group(ops.pool(a, 3, how), 1, "sum")[0, 0].tolist()

    def summed_then_pooled(how):
        return ops.pool(ops.reduce_group(a, 1, "sum"), 3, how)[0, 0].tolist()

    average = pytest.approx([4 / 3, 4 / 3, 7 / 3, 4 / 3])
    assert pooled_then_summed("avg") == average
    assert summed_then_pooled("avg") == average
    assert pooled_then_summed("max") == [4, 4, 7, 4]
    assert summed_then_pooled("max") == [3, 3, 4, 4]


def test_pooling_examples():
    a = torch.tensor([[[0.1, 0.9, 0.1, 0.1, 0.5, 0.1, 0.1]]])
    largest = [0.9, 0.9, 0.9, 0.5, 0.5, 0.5, 0.1]
    assert ops.pool(a, 3, "max")[0, 0].tolist() == pytest.approx(largest)
    average = [0.3333, 0.3667, 0.3667, 0.2333, 0.2333, 0.2333, 0.0667]
    assert ops.pool(a, 3, "avg")[0, 0].tolist() == pytest.approx(average, abs=1e-4)
    assert torch.equal(ops.pool(a, 1, "max"), a)
    assert torch.equal(ops.pool(a, 7, "none"), a)


def test_all_group_options_agree_without_grouping(qk):
    q, _ = qk
    k = torch.randn(H, N, D, generator=torch.Generator().manual_seed(9))
    scores = [
        SnapKV(window=8, group=how, group_order=order).score(view(q, k))
        for how in ("sum", "mean", "max")
        for order in ("before", "after")
    ]
    assert all(torch.equal(scores[0], other) for other in scores)


def test_h2o_sums_are_harmonic_tails_for_zero_queries():
    q, k = zeros(4)
    seen = view(q, k)
    observed = H2O().observe(seen)
    assert observed[0, 0].tolist() == pytest.approx([2.083333, 1.083333, 0.583333, 0.25])
    mean = H2O(per_query=True).score(view(q, k, carried=observed))
    assert mean[0, 0].tolist() == pytest.approx([0.520833, 0.361111, 0.291667, 0.25], abs=1e-6)


def test_h2o_sums_to_the_number_of_queries(qk):
    assert H2O(group="sum").observe(view(*qk)).sum(-1)[0].tolist() == pytest.approx([3 * N, 3 * N])


def test_tova_averages_all_heads_of_the_newest_query():
    logits = torch.tensor([[0.5, 0.1, 0.2, 0.05, 0.15], [0.1, 0.3, 0.2, 0.3, 0.1]]).log()
    q = torch.eye(2)[:, None]  # head h reads coordinate h of the keys
    k = logits.T[None]
    seen = view(q, k, scale=1.0)
    assert Tova().score(seen)[0, 0].tolist() == pytest.approx([0.3, 0.2, 0.2, 0.175, 0.125])


def test_knorm_example():
    k = torch.zeros(1, 5, 2)
    k[0, :, 0] = torch.tensor([3.0, 1, 2, 1, 5])
    q = torch.zeros(1, 5, 2)
    for keep, want in ((3, [1, 2, 3]), (2, [1, 3])):
        assert kvtrim.select("knorm", q, k, k, keep=keep)[0][0].tolist() == want
        assert kvtrim.select("knorm", q, k * 7, k * 0, keep=keep)[0][0].tolist() == want


def test_knorm_does_not_change_under_rope(qk):
    q, k = qk
    angle = torch.arange(N)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01])
    cos, sin = angle.cos(), angle.sin()
    a, b = k[..., :4], k[..., 4:]
    turned = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
    plain = kvtrim.select("knorm", q, k, k, keep=11)
    rotated = kvtrim.select("knorm", q, turned, k, keep=11)
    assert [h.tolist() for h in plain[0]] == [h.tolist() for h in rotated[0]]


def test_streaming_llm_examples():
    q, k = zeros(20)
    assert kvtrim.select("streaming-llm", q, k, k, keep=8)[0][0].tolist() == [
        0,
        1,
        2,
        3,
        16,
        17,
        18,
        19,
    ]


def test_snapkv_equals_the_loops_for_every_reduction(qk):
    q, k = qk
    weights = oracles.window_weights(q, k, 8, D**-0.5)[..., : N - 8]
    reductions, pools = ("sum", "mean", "max"), ("none", "avg", "max")
    for rows, group, pool in itertools.product(("sum", "mean"), reductions, pools):
        votes = getattr(weights, rows)(1)
        grouped = votes.view(K, 3, -1)
        reduced = grouped.amax(1) if group == "max" else getattr(grouped, group)(1)
        kernel = {"none": 1, "avg": 5, "max": 5}[pool]
        want = torch.zeros_like(reduced)
        for j in range(N - 8):
            near = reduced[:, max(0, j - kernel // 2) : j + kernel // 2 + 1]
            want[:, j] = near.amax(1) if pool == "max" else near.sum(1) / kernel
        policy = SnapKV(window=8, kernel=5, pool=pool, rows=rows, group=group)
        torch.testing.assert_close(policy.score(view(q, k))[0], want.float(), rtol=1e-4, atol=1e-6)


def test_a_later_token_changes_nothing(qk):
    q, k = qk
    short = SnapKV(window=8).score(view(q[:, :30], k[:, :30]))
    other = k.clone()
    other[:, 30:] = 99
    assert torch.equal(short, SnapKV(window=8).score(view(q[:, :30], other[:, :30])))
