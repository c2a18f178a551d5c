"""CurDKV and AdaCurDKV: recorded cases, worked examples, loops, invariances of the scores."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import golden
import kvtrim
import oracles
import views
from kvtrim.errors import UsageError
from kvtrim.methods.budgets import PerHead, Uniform
from kvtrim.methods.policies import curdkv
from kvtrim.methods.policies.curdkv import CurDKV
from kvtrim.methods.selection import select
from kvtrim.methods.settings import find
from kvtrim.types import Room

LEVERAGE = {"kv_product": "kv", "key": "key", "value": "value", "kv_avg": "mean"}
CASES = golden.cases("curdkv")
PLAIN = [case for case in CASES if case.params["variant"] in ("kvpress", "ada_kvpress")]
SKETCHED = [case for case in CASES if "sketch" in case]
EXACT = [case for case in CASES if case.params["variant"] == "paper_svd"]


def view(k, v, **options):
    """A layer that nobody queries."""
    return views.view(k[:, :0], k, v, **{"scale": 1.0, **options})


def random_view(seed=0, heads=3, n=40, width=8, values=8, **options):
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.rand(heads, n, 1, generator=draw) * 3
    k = torch.randn(heads, n, width, generator=draw) * sizes
    return view(k, torch.randn(heads, n, values, generator=draw), **options)


def of_energies(*heads):
    """Keys and values of one number each, whose squares are the given energies."""
    return torch.tensor(heads).sqrt()[..., None]


def parameters(case):
    params = case.params
    return {
        "project": None,
        "leverage": LEVERAGE[params["kind"]],
        "local_window": params.get("local_window") or None,
        "padding": "tail",
        "sinks": params["sinks"],
    }


def test_every_recorded_case_is_covered():
    assert len(PLAIN) + len(SKETCHED) + len(EXACT) == len(CASES) == 15


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.id)
def test_row_energies_keep_the_recorded_tokens(case):
    params = case.params
    name = "ada-curdkv" if params["variant"] == "ada_kvpress" else "curdkv"
    floor = {"floor": params["floor"]} if "floor" in params else {}
    settings = parameters(case) | floor
    kept = kvtrim.select(name, *case.qkv(), keep=params["n_kept"], **settings)
    assert case.differing_heads(kept[0]) == []
    (_,), (k,), (v,) = case.qkv()
    scores = CurDKV(**parameters(case)).score(view(k, v))[0]
    free = slice(params["sinks"], None)
    torch.testing.assert_close(
        scores[:, free], case.tensor("scores")[:, free], rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("case", SKETCHED, ids=lambda case: case.id)
def test_a_given_sketch_keeps_the_recorded_tokens(case):
    (_,), (k,), (v,) = case.qkv()
    policy = CurDKV(sinks=case.params["sinks"])
    scores = policy.shares(view(k, v), case.tensor("sketch"))
    kept = chosen(policy, scores, case.params["n_kept"])
    assert case.differing_heads(kept) == []


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.id)
def test_true_leverage_keeps_the_recorded_tokens(case):
    params = case.params
    settings = {"exact": True, "rank": params["rank"], "sinks": params["sinks"]}
    kept = kvtrim.select("curdkv", *case.qkv(), keep=params["n_kept"], **settings)
    assert case.differing_heads(kept[0]) == []


def chosen(policy, scores, keep):
    counts = torch.full(scores.shape[:2], keep - policy.sinks)
    return list(select(scores, counts, scores.shape[-1], sinks=policy.sinks).slots[0])


# Worked examples of the specification

LK = [4.0, 1, 9, 1, 4, 2, 1, 6]
LV = [1.0, 4, 1, 9, 4, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, [0, 2, 4, 7]),
        ({"leverage": "key"}, [0, 2, 4, 7]),
        ({"leverage": "value"}, [0, 1, 3, 4]),
        ({"leverage": "mean"}, [0, 2, 3, 7]),
        ({"local_window": 3, "padding": "tail"}, [0, 2, 4, 7]),
        ({"local_window": 3, "padding": "front"}, [0, 1, 4, 7]),
    ],
)
def test_worked_selections(options, want):
    k, v = of_energies(LK), of_energies(LV)
    kept = kvtrim.select("curdkv", k, k, v, keep=4, project=None, sinks=1, **options)
    assert kept[0][0].tolist() == want


def test_worked_shares():
    seen = view(of_energies(LK), of_energies(LV))
    share = CurDKV(project=None).score(seen)[0, 0]
    want = [0.0625, 0.0625, 0.140625, 0.140625, 0.25, 0.03125, 0.03125, 0.28125]
    assert share.tolist() == pytest.approx(want)


@pytest.mark.parametrize(
    ("padding", "want"),
    [
        ("tail", [0.0476, 0.0476, 0.1071, 0.0918, 0.1633, 0.0204, 0.0571, 0.5143]),
        ("front", [0.16, 0.16, 0.0459, 0.0459, 0.0816, 0.0370, 0.0370, 0.3333]),
    ],
)
def test_worked_local_shares(padding, want):
    both = torch.tensor([[LK, LV]])
    local = curdkv.local_shares(both, torch.tensor([[8, 8]]), 3, padding)
    assert (local[0, 0] * local[0, 1]).tolist() == pytest.approx(want, abs=5e-5)


@pytest.mark.parametrize(
    ("keep", "floor", "want"),
    [(4, 0.5, [[0, 1, 2, 3, 4, 7], [0, 7]]), (3, 0.2, [[0, 2, 4, 7], [0, 7]])],
)
def test_worked_head_budgets(keep, floor, want):
    k = of_energies(LK, [30.0, 1, 1, 1, 1, 1, 1, 28])
    v = of_energies(LV, [1.0] * 8)
    kept = kvtrim.select("ada-curdkv", k, k, v, keep=keep, floor=floor, project=None, sinks=1)
    assert [head.tolist() for head in kept[0]] == want


def test_projections_keep_energies_on_average():
    x = torch.tensor([[[[3.0, 1, -2, 0.5]]]])
    found = torch.stack(
        [curdkv.energies(x, curdkv.gaussian(seed, 1, 4, 20)).flatten() for seed in range(4000)]
    )
    norm = float(x.square().sum())
    assert float(found.mean()) == pytest.approx(norm, rel=0.02)
    assert float(found.std()) / norm == pytest.approx((2 / 20) ** 0.5, rel=0.05)


def test_wide_projections_approach_none():
    seen = random_view()
    plain = CurDKV(project=None).score(seen)
    wide = CurDKV(project=20_000).score(seen)
    assert float((wide / plain - 1).abs().max()) < 0.1


# Loops


def shares_by_loops(k, v, policy, lengths):
    """Shares [K, n] of each head, one number at a time, float64."""
    out = torch.zeros(k.shape[:2], dtype=torch.float64)
    for h, length in enumerate(lengths):
        both = []
        for x in (k, v):
            rows = [sum(float(a) ** 2 for a in x[h, j].double()) for j in range(length)]
            width = policy.local_window
            if width:
                first = length % width if policy.padding == "front" else 0
                starts = [*([0] if first else []), *range(first, length, width)]
                for a, b in zip(starts, [*starts[1:], length], strict=True):
                    total = sum(rows[a:b])
                    rows[a:b] = [row / total for row in rows[a:b]]
            both.append(rows)
        pairs = list(zip(*both, strict=True))
        mixed = {
            "kv": [a * b for a, b in pairs],
            "key": both[0],
            "value": both[1],
            "mean": [(a + b) / 2 for a, b in pairs],
        }[policy.leverage]
        for j, weight in enumerate(mixed):
            out[h, j] = weight / sum(mixed)
    return out


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_shares_equal_the_loops_whatever_the_lengths(data):
    n = data.draw(st.integers(1, 40))
    lengths = [data.draw(st.integers(1, n)) for _ in range(3)]
    lengths[data.draw(st.integers(0, 2))] = n
    policy = CurDKV(
        project=None,
        leverage=data.draw(st.sampled_from(["kv", "key", "value", "mean"])),
        local_window=data.draw(st.sampled_from([None, 1, 3, 16])),
        padding=data.draw(st.sampled_from(["front", "tail"])),
    )
    seen = random_view(data.draw(st.integers(0, 99)), n=n, lengths=torch.tensor([lengths]))
    garbage = torch.arange(n) >= torch.tensor(lengths)[:, None]
    dirty = dataclasses.replace(seen, keys=seen.keys.masked_fill(garbage[..., None], torch.nan))
    got = policy.score(dirty)[0]
    want = shares_by_loops(seen.keys[0], seen.values[0], policy, lengths).float()
    torch.testing.assert_close(got[~garbage], want[~garbage], rtol=1e-4, atol=1e-7)
    assert float(got[garbage].abs().sum()) == 0


def test_rows_that_alone_span_a_direction_have_leverage_one_to_the_bit():
    """Fewer rows than their width: rounding must not rank them, nor order them by the batch."""
    draw = torch.Generator().manual_seed(0)
    for count in (1, 5, 8):
        found = curdkv.leverages(torch.randn(3, 2, count, 8, generator=draw))
        assert found.unique().tolist() == [1]


def leverages_by_gram_schmidt(rows):
    """Squared row norms of an orthonormal basis of the columns, built one column at a time."""
    basis = []
    for column in rows.double().T:
        size = column.norm()
        for direction in basis * 2:
            column = column - (column @ direction) * direction
        if column.norm() > 1e-5 * size:
            basis.append(column / column.norm())
    return sum(direction**2 for direction in basis)


@pytest.mark.parametrize(("n", "width"), [(40, 8), (5, 8)])
def test_true_leverage_equals_an_orthonormal_basis_of_the_columns(n, width):
    rows = torch.randn(1, 2, n, width, generator=torch.Generator().manual_seed(1))
    rows[0, 1, :, 3] = rows[0, 1, :, 0] - 2 * rows[0, 1, :, 1]  # one direction less
    got = curdkv.leverages(rows)[0]
    for head in range(2):
        want = leverages_by_gram_schmidt(rows[0, head])
        torch.testing.assert_close(got[head], want.float(), rtol=1e-3, atol=1e-5)
    assert got.sum(-1).tolist() == pytest.approx([min(n, width), min(n, width - 1)], abs=1e-3)


def test_true_leverage_does_not_change_when_columns_are_mixed():
    seen = random_view()
    policy = CurDKV(exact=True)
    mix = torch.randn(8, 8, generator=torch.Generator().manual_seed(4)) + 4 * torch.eye(8)
    mixed = dataclasses.replace(seen, keys=seen.keys @ mix)
    torch.testing.assert_close(policy.score(mixed), policy.score(seen), rtol=1e-3, atol=1e-6)


def test_true_leverage_of_heads_of_different_length_is_that_of_each_head_alone():
    seen = random_view(lengths=torch.tensor([[40, 12, 25]]))
    got = CurDKV(exact=True).score(seen)[0]
    for head, length in enumerate((40, 12, 25)):
        own = view(
            seen.keys[0, head : head + 1, :length], seen.values[0, head : head + 1, :length]
        )
        want = CurDKV(exact=True).score(own)[0, 0]
        torch.testing.assert_close(got[head, :length], want, rtol=1e-3, atol=1e-6)


# What scores must and must not depend on


@pytest.mark.parametrize("name", ["curdkv", "ada-curdkv"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"project": None},
        {"project": None, "leverage": "key"},
        {"project": None, "leverage": "value"},
        {"policy.exact": True},
        {"preset": "authors"},
        {"preset": "kvpress", "leverage": "mean"},
    ],
    ids=str,
)
def test_the_size_of_a_heads_keys_or_values_changes_nothing(name, options):
    seen = random_view(5)
    k, v = seen.keys[0], seen.values[0]
    sizes = torch.tensor([2.0**-12, 1.0, 2.0**9])[:, None, None]
    want = kvtrim.select(name, k, k, v, keep=12, **options)
    for scaled in ((k * sizes, v), (k, v * sizes), (k * sizes, v * sizes)):
        got = kvtrim.select(name, k, *scaled, keep=12, **options)
        assert [h.tolist() for h in got[0]] == [h.tolist() for h in want[0]]


def test_permuting_heads_together_with_their_sketches_permutes_the_scores():
    seen = random_view()
    turned = dataclasses.replace(seen, keys=seen.keys.flip(1), values=seen.values.flip(1))
    sketch = curdkv.gaussian(0, 3, 8, 20)
    policy = CurDKV()
    torch.testing.assert_close(
        policy.shares(turned, sketch.flip(0)), policy.shares(seen, sketch).flip(1)
    )
    for options in ({"project": None}, {"exact": True}, {"project": None, "local_window": 16}):
        plain = CurDKV(**options)
        torch.testing.assert_close(plain.score(turned), plain.score(seen).flip(1))


def test_a_sketch_is_the_same_for_keys_and_values_and_differs_by_head_layer_and_seed():
    x = torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(2)).expand(2, 20, 8)
    key, value = (CurDKV(leverage=which).score(view(x, x)) for which in ("key", "value"))
    assert torch.equal(key, value)
    assert not torch.equal(key[0, 0], key[0, 1])
    again = CurDKV(leverage="key").score(view(x, x))
    assert torch.equal(key, again)
    assert not torch.equal(key, CurDKV(leverage="key").score(view(x, x, index=1)))
    assert not torch.equal(key, CurDKV(leverage="key", seed=1).score(view(x, x)))


def test_values_may_be_narrower_than_keys():
    for width, values in ((8, 4), (4, 8)):
        seen = random_view(width=width, values=values)
        for policy in (CurDKV(), CurDKV(exact=True), CurDKV(project=None)):
            assert policy.score(seen).isfinite().all()


@pytest.mark.parametrize("preset", ["paper", "authors", "kvpress"])
@pytest.mark.parametrize("exact", [False, True])
def test_half_precision_is_scored_in_full(preset, exact):
    policy = find("curdkv", preset=preset, exact=exact).policy
    seen = random_view()
    for dtype in (torch.bfloat16, torch.float16):
        low = dataclasses.replace(seen, keys=seen.keys.to(dtype), values=seen.values.to(dtype))
        same = dataclasses.replace(seen, keys=low.keys.float(), values=low.values.float())
        assert policy.score(low).dtype == torch.float32
        assert torch.equal(policy.score(low), policy.score(same))


def test_rows_of_zeros_give_no_gaps():
    zero = torch.zeros(2, 20, 4)
    one = zero.clone()
    one[0, 3] = 1
    for options in ({}, {"exact": True}, {"local_window": 16, "project": None}):
        for k, v in ((zero, zero), (one, zero), (one, one)):
            assert CurDKV(**options).score(view(k, v)).isfinite().all()


@pytest.mark.parametrize("name", ["project", "local_window", "rank"])
def test_a_width_below_one_is_refused(name):
    with pytest.raises(UsageError, match=f"{name}=0: expected int .1 or more. or none"):
        CurDKV(**{name: 0})


# AdaCurDKV


@settings(max_examples=60, deadline=None)
@given(
    st.integers(6, 60), st.integers(1, 4), st.integers(0, 999), st.sampled_from([0.0, 0.2, 0.5])
)
def test_the_heads_of_a_layer_share_exactly_its_budget(n, heads, seed, floor):
    seen = random_view(seed, heads=heads, n=n)
    keep = torch.randint(5, n, (1,), generator=torch.Generator().manual_seed(seed)).item()
    k, v = seen.keys[0], seen.values[0]
    (kept,) = kvtrim.select("ada-curdkv", k, k, v, keep=keep, floor=floor)
    assert sum(len(head) for head in kept) == heads * keep
    scores = CurDKV().score(seen)[0]
    for head, positions in enumerate(kept):
        assert {0, 1, 2, 3} <= set(positions.tolist())
        assert len(positions) >= max(int(floor * keep), 4)
        best = oracles.top(scores[head, 4:].tolist(), len(positions) - 4)
        assert positions.tolist() == [0, 1, 2, 3, *(j + 4 for j in best)]


def test_full_safety_is_a_uniform_budget():
    scores = CurDKV().score(random_view())[..., 4:]
    room = Room(layer=0, layers=1, heads=3, keep=12, asked=12.0, protected=4, tokens=40)
    even = Uniform().counts(room, scores)
    assert torch.equal(PerHead(rule="floor", floor=1.0).counts(room, scores), even)
