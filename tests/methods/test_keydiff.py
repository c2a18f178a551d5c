"""KeyDiff: recorded cases, worked examples, loops, and what scores must not depend on."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import golden
import kvtrim
import views
from kvtrim.methods.policies.keydiff import KeyDiff

CASES = golden.cases("keydiff")


def view(k, **options):
    """A layer that nobody queries."""
    return views.view(k[:, :0], k, **{"scale": 1.0, **options})


def keys(seed=0, heads=3, n=30, width=8):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(heads, n, width, generator=draw) + torch.randn(
        heads, 1, width, generator=draw
    )


def scores_by_loops(k):
    """Scores of one head's keys [n, D], float64."""
    units = [row / max(float(row.norm()), 1e-12) for row in k.double()]
    anchor = sum(units) / len(units)
    size = max(float(anchor.norm()), 1e-12)
    return torch.stack([-(unit @ anchor) / size for unit in units])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_it_keeps_the_recorded_tokens(case):
    kept = kvtrim.select("keydiff", *case.qkv(), keep=case.params["n_kept"])
    assert case.differing_heads(kept[0]) == []
    scores = KeyDiff().score(view(case.qkv()[1][0]))[0]
    torch.testing.assert_close(scores, case.tensor("scores"), rtol=1e-4, atol=1e-6)


def test_every_recorded_case_is_covered():
    assert len(CASES) == 5


def test_worked_example():
    k = torch.tensor([[[2.0, 0], [1, 0], [1, 1], [0, -3]]])
    want = [-0.994198, -0.994198, -0.626943, -0.107566]
    assert KeyDiff().score(view(k))[0, 0].tolist() == pytest.approx(want, abs=1e-6)
    for keep, kept in ((2, [2, 3]), (3, [0, 2, 3])):
        assert kvtrim.select("keydiff", k, k, k, keep=keep)[0][0].tolist() == kept


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_scores_equal_the_loops_whatever_the_lengths(data):
    n = data.draw(st.integers(1, 30))
    lengths = [data.draw(st.integers(1, n)) for _ in range(3)]
    lengths[data.draw(st.integers(0, 2))] = n
    k = keys(data.draw(st.integers(0, 99)), n=n)
    dirty = k.masked_fill(
        (torch.arange(n) >= torch.tensor(lengths)[:, None])[..., None], torch.nan
    )
    got = KeyDiff().score(view(dirty, lengths=torch.tensor([lengths])))[0]
    for head, length in enumerate(lengths):
        want = scores_by_loops(k[head, :length]).float()
        torch.testing.assert_close(got[head, :length], want, rtol=1e-4, atol=1e-5)


def test_the_length_of_a_key_changes_nothing():
    k = keys()
    sizes = torch.rand(3, 30, 1, generator=torch.Generator().manual_seed(1)) * 50 + 1e-3
    torch.testing.assert_close(KeyDiff().score(view(k * sizes)), KeyDiff().score(view(k)))


def test_turning_all_keys_together_changes_nothing():
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(2))).Q
    turned = KeyDiff().score(view(keys() @ turn))
    torch.testing.assert_close(turned, KeyDiff().score(view(keys())), rtol=1e-4, atol=1e-6)


def test_the_cosines_sum_to_the_size_of_the_anchor():
    k = keys()
    anchor = (k / k.norm(dim=-1, keepdim=True)).mean(dim=1).norm(dim=-1)  # [K]
    sums = -KeyDiff().score(view(k))[0].sum(dim=-1)
    torch.testing.assert_close(sums, 30 * anchor)


def test_equal_keys_score_equally_and_the_lower_slot_wins():
    k = keys(n=10).repeat(1, 2, 1)
    scores = KeyDiff().score(view(k))[0]
    assert torch.equal(scores[:, :10], scores[:, 10:])
    (kept,) = kvtrim.select("keydiff", k, k, k, keep=9)
    for head in kept:
        found = set(head.tolist())
        assert all(slot - 10 in found for slot in found if slot >= 10)


def test_scores_are_cosines_and_a_key_of_zeros_scores_zero():
    k = keys()
    k[0, 4] = 0
    scores = KeyDiff().score(view(k))[0]
    assert scores[0, 4] == 0
    assert float(scores.abs().max()) <= 1 + 1e-6
    balanced = torch.tensor([[[1.0, 0], [-1, 0], [0, 1], [0, -1]]])
    assert KeyDiff().score(view(balanced)).isfinite().all()


def test_half_precision_is_scored_in_full():
    for dtype in (torch.bfloat16, torch.float16):
        low = keys().to(dtype) * 100
        scores = KeyDiff().score(view(low))
        assert scores.dtype == torch.float32
        assert torch.equal(scores, KeyDiff().score(view(low.float())))


def test_a_window_and_sinks_can_be_reserved():
    k = keys(n=40)
    (kept,) = kvtrim.select("keydiff", k, k, k, keep=12, window=5, sinks=2)
    for head in kept:
        assert {0, 1, *range(35, 40)} <= set(head.tolist())
        assert len(head) == 12


def test_it_prefers_what_is_unlike_the_rest():
    angle = torch.full((1, 20), 0.1)
    angle[0, 7] = math.pi / 2
    k = torch.stack([angle.cos(), angle.sin()], dim=-1)
    assert int(KeyDiff().score(view(k)).argmax()) == 7


def test_one_prompt_does_not_change_another():
    both = dataclasses.replace(
        view(keys()),
        keys=torch.stack([keys(0), keys(1)]),
        values=torch.stack([keys(0), keys(1)]),
        queries=torch.zeros(2, 3, 0, 8),
        positions=torch.arange(30).int().expand(2, 3, 30),
    )
    torch.testing.assert_close(KeyDiff().score(both)[1:], KeyDiff().score(view(keys(1))))
