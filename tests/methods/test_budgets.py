"""How many entries each layer and head gets: worked examples and invariants."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from kvtrim.errors import BudgetError, UsageError
from kvtrim.methods.budgets import PerHead, Pyramid, Uniform
from kvtrim.methods.keep import Keep
from kvtrim.types import Room

UNITS = ("B", "KB", "MB", "GB", "KiB", "MiB", "GiB")


def room(keep, protected, tokens, layer=0, layers=1, heads=2):
    return Room(layer, layers, heads, keep, float(keep), protected, tokens)


def scores_with(won, width=3000):
    """Scores whose flat top entries lie in the heads as `won` says."""
    scores = torch.zeros(1, len(won), width)
    for head, count in enumerate(won):
        scores[0, head, :count] = 1
    return scores


@pytest.mark.parametrize(
    ("keep", "window", "layers", "n", "first", "last", "mean"),
    [
        (512, 8, 32, 8192, [991, 961, 931], 61, 526.0),
        (2048, 8, 32, 8192, [3986, 3861, 3736], 111, 2048.5),
        (512, 8, 40, 8192, [991, 967, 943], 55, 523.0),
        (512, 8, 28, 8192, [991, 956, 921], 46, 518.5),
        (128, 8, 32, 8192, [242, 235, 228], 25, 133.5),
        (64, 8, 4, 200, [118, 82, 46], 10, 64.0),
        (512, 8, 32, 1007, [512, 512, 512], 512, 512),
        (512, 8, 32, 1008, [991, 961, 931], 61, 526.0),
    ],
)
def test_pyramid_lengths(keep, window, layers, n, first, last, mean):
    scores = torch.zeros(1, 2, n - window)
    stored = [
        int(Pyramid().counts(room(keep, window, n, i, layers), scores)[0, 0]) + window
        for i in range(layers)
    ]
    assert stored[:3] == first
    assert stored[-1] == last
    assert sum(stored) / layers == mean


@pytest.mark.parametrize(
    ("ratio", "first", "last", "mean"), [(0.5, 7987, 205, 4096), (0.75, 3994, 102, 2048)]
)
def test_pyramid_lengths_of_kvpress(ratio, first, last, mean):
    n, window, layers = 8192, 64, 32
    asked = n * (1 - ratio)
    rooms = [Room(i, layers, 2, int(asked), asked, window, n) for i in range(layers)]
    scores = torch.zeros(1, 2, n - window)
    pyramid = Pyramid(rounding="kvpress")
    stored = [int(pyramid.counts(r, scores)[0, 0]) + window for r in rooms]
    assert (stored[0], stored[-1]) == (first, last)
    assert sum(stored) / layers == pytest.approx(mean, abs=0.5)


def test_pyramid_of_kvpress_falls_back_to_uniform():
    asked = 8192 * (1 - 0.9)
    got = Pyramid(rounding="kvpress").entries(Room(5, 32, 2, int(asked), asked, 64, 8192))
    assert got + 64 == 819


@settings(max_examples=200, deadline=None)
@given(st.integers(9, 400), st.integers(1, 40), st.integers(2, 2000), st.integers(2, 30))
def test_an_exact_pyramid_spends_its_budget_to_the_entry(keep, layers, n, beta):
    rooms = [room(keep, 8, n, i, layers) for i in range(layers)]
    pyramid = Pyramid(beta=beta, exact=True)
    entries = [pyramid.entries(r) for r in rooms]
    if keep < n:
        assert sum(entries) == layers * (keep - 8)


@pytest.mark.parametrize(
    ("b", "floor", "won", "caps"),
    [
        (504, 0.2, [2016, 0, 0, 0], [1713, 100, 100, 100]),
        (5, 0.2, [10, 6, 3, 1], [9, 6, 3, 2]),
        (5, 0.2, [8, 2], [7, 3]),
        (5, 0.5, [1, 9], [2, 6]),
    ],
)
def test_blended_head_budgets(b, floor, won, caps):
    scores = scores_with(won)
    got = PerHead(floor=floor).counts(room(b, 0, 3000, heads=len(won)), scores)
    assert got[0].tolist() == caps


def test_a_floor_of_one_is_uniform_and_equal_heads_share_equally():
    scores = torch.rand(1, 4, 100)
    assert PerHead(floor=1.0).counts(room(20, 0, 100, heads=4), scores)[0].tolist() == [20] * 4
    same = torch.rand(1, 1, 100).expand(1, 4, 100)
    assert PerHead(floor=0.0).counts(room(20, 0, 100, heads=4), same)[0].tolist() == [20] * 4


def test_floors_outside_of_zero_to_one_are_refused():
    with pytest.raises(UsageError, match=r"expected float .0 to 1"):
        PerHead(floor=1.5)


@st.composite
def layers_of_scores(draw):
    heads, width = draw(st.integers(1, 5)), draw(st.integers(2, 40))
    values = draw(st.lists(st.integers(0, 9), min_size=heads * width, max_size=heads * width))
    return torch.tensor(values, dtype=torch.float32).view(1, heads, width)


@settings(max_examples=200, deadline=None)
@given(layers_of_scores(), st.data())
def test_competition_conserves_the_layer_total(scores, data):
    _, heads, width = scores.shape
    keep = data.draw(st.integers(1, width))
    won = PerHead(floor=0.0).counts(room(keep, 0, width, heads=heads), scores)
    assert int(won.sum()) == heads * keep
    best = oracles.top(scores.flatten().tolist(), heads * keep)
    assert won[0].tolist() == [sum(i // width == h for i in best) for h in range(heads)]
    here = room(keep, 0, width, heads=heads)
    floor = data.draw(st.floats(0, 1))
    exact = PerHead(floor=floor, exact=True).counts(here, scores)
    assert int(exact.sum()) == heads * keep or bool((exact == width).any())
    protected = PerHead(floor=floor, rule="floor").counts(here, scores)
    assert int(protected.sum()) == heads * keep
    assert bool((protected >= min(int(floor * keep), keep)).all())


@settings(max_examples=60, deadline=None)
@given(layers_of_scores(), st.data())
def test_permuting_heads_permutes_their_budgets(scores, data):
    scores = scores + torch.rand_like(scores)  # no ties
    _, heads, width = scores.shape
    keep = data.draw(st.integers(1, width - 1))
    order = data.draw(st.permutations(range(heads)))
    here = room(keep, 0, width, heads=heads)
    plain = PerHead().counts(here, scores)
    assert torch.equal(PerHead().counts(here, scores[:, order]), plain[:, order])


def test_raising_one_heads_scores_never_lowers_its_budget():
    scores = torch.rand(1, 3, 50)
    louder = scores.clone()
    louder[0, 1] *= 3
    here = room(12, 0, 50, heads=3)
    assert PerHead().counts(here, louder)[0, 1] >= PerHead().counts(here, scores)[0, 1]


def test_heads_compete_for_what_a_pyramid_gives_their_layer():
    scores = torch.rand(1, 2, 400)
    budget = PerHead(exact=True, layers=Pyramid())
    totals = [int(budget.counts(room(64, 8, 408, i, 4), scores).sum()) for i in range(4)]
    alone = [2 * Pyramid().entries(room(64, 8, 408, i, 4)) for i in range(4)]
    assert totals == alone


def test_uniform_never_gives_more_than_there_is():
    assert Uniform().counts(room(64, 8, 30), torch.zeros(1, 2, 22)).tolist() == [[22, 22]]


@pytest.mark.parametrize(
    ("given_", "kind", "amount"),
    [
        (512, "tokens", 512),
        ("512", "tokens", 512),
        (0.25, "share", 0.25),
        ("25%", "share", 0.25),
        ("0.25", "share", 0.25),
        ("1/16", "share", 0.0625),
        (1.0, "share", 1),
        ("256MiB", "bytes", 2**28),
        ("1.5 GB", "bytes", 1.5e9),
    ],
)
def test_keep_can_be_given_in_many_ways(given_, kind, amount):
    keep = Keep.parse(given_)
    assert (keep.kind, keep.amount) == (kind, amount)
    assert Keep.parse(keep) is keep
    assert Keep.parse(str(keep)) == keep


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (512, "512"),
        (0.25, "25%"),
        (0.07, "7%"),
        (0.125, "12.5%"),
        (1.0, "100%"),
        ("64MiB", "67108864B"),
        ("1.5 KiB", "1536B"),
        ("1/3", "0.3333333333333333"),
        ("0.5B", "0.5B"),
        (1e-9, "0.000000001"),
        (10**30, "1000000000000000019884624838656"),
    ],
)
def test_a_budget_as_text_is_short_where_that_is_exact(asked, text):
    assert str(Keep.parse(asked)) == text
    assert Keep.parse(text) == Keep.parse(asked)


_PARTS = st.builds(lambda part, more: f"{part}/{part + more}", *[st.integers(1, 10**8)] * 2)
_SIZES = st.floats(0, 1e300, exclude_min=True, allow_subnormal=True)
KEEPS = [
    *(st.integers(1, 10**308), st.floats(0, 1, exclude_min=True), _PARTS),
    st.integers(1, 10**7).map(lambda n: f"{n / 10**5:f}%"),
    st.builds(
        lambda size, unit: f"{size:.3f}{unit}", st.floats(0.001, 1e9), st.sampled_from(UNITS)
    ),
]


@given(st.one_of(*KEEPS).map(Keep.parse) | _SIZES.map(lambda size: Keep("bytes", size)))
def test_a_budget_is_read_back_from_its_text(keep):
    assert Keep.parse(str(keep)) == keep


@pytest.mark.parametrize(
    "bad",
    [
        0,
        -3,
        0.0,
        1.5,
        "150%",
        "0",
        "abc",
        "",
        "1/0",
        "3/2",
        "12 parsecs",
        None,
        True,
        float("nan"),
        float("inf"),
        10**400,
        "9" * 400,
        "9" * 400 + "B",
        10**5000,
        "9" * 5000,
    ],
    ids=lambda bad: f"{type(bad).__name__}" if not isinstance(bad, str) else bad[:20],
)
def test_what_is_no_budget_is_refused(bad):
    with pytest.raises(BudgetError):
        Keep.parse(bad)


@pytest.mark.parametrize(
    ("n", "share", "entries"), [(10, 0.1, 1), (100, 0.09, 9), (8192, 0.1, 819), (200, 0.24, 48)]
)
def test_shares_are_not_lost_to_floating_point(n, share, entries):
    assert Keep.parse(share).entries(n, protected=0, entry_bytes=1) == entries


def test_a_share_is_lifted_to_what_the_method_needs():
    assert Keep.parse(0.1).entries(100, protected=32, entry_bytes=1) == 33
