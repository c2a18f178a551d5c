"""Budgets whose layers compete: cutting as layers go by equals cutting at the end."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtrim.methods.budgets import Global, LayerShare, PerHead
from kvtrim.types import Room

FEW = settings(max_examples=60, deadline=None)


def rooms(layers, heads, keep, width, protected=0):
    return [
        Room(i, layers, heads, keep, float(keep), protected, width + protected)
        for i in range(layers)
    ]


def stages(budget, scores, keep, wanted=None, protected=0):
    """What each layer holds after every stage: scores is a list of [B, K, N]."""
    ledger, found = budget.open(), []
    here = rooms(len(scores), scores[0].shape[1], keep, scores[0].shape[2], protected)
    for i, (room, own) in enumerate(zip(here, scores, strict=True)):
        asked = torch.full(
            own.shape[:1], 1.0 if wanted is None else wanted[i], dtype=torch.float64
        )
        found.append(ledger.add(room, own, asked))
    return found


def best_of_all(scores, entries):
    """(layer, head, slot) of the best entries, ties to the lowest, by sorting everything."""
    listed = [
        (-float(score), layer, head, slot)
        for layer, own in enumerate(scores)
        for head, row in enumerate(own)
        for slot, score in enumerate(row)
    ]
    return sorted(listed)[:entries]


@FEW
@given(st.data())
def test_the_streamed_pool_is_the_top_of_all_layers(data):
    layers, heads = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    width = data.draw(st.integers(1, 7))
    keep = data.draw(st.integers(1, width))
    levels = st.lists(st.integers(0, 4), min_size=heads * width, max_size=heads * width)
    scores = [torch.tensor(data.draw(levels)).float().view(1, heads, width) for _ in range(layers)]
    found = stages(Global(), scores, keep)
    best = best_of_all([own[0] for own in scores], layers * heads * keep)
    for layer in range(layers):
        for head in range(heads):
            expected = sum(1 for _, at, h, _ in best if (at, h) == (layer, head))
            assert int(found[-1][layer][0, head]) == expected
    assert sum(int(counts.sum()) for counts in found[-1]) == layers * heads * keep


@FEW
@given(st.data())
@pytest.mark.parametrize(
    "budget",
    [
        Global(),
        Global(floor=0.3),
        LayerShare(),
        LayerShare(rounding="even"),
        LayerShare(rounding="even", spread=False),
        PerHead(layers=LayerShare()),
        PerHead(layers=Global()),
    ],
    ids=str,
)
def test_a_layer_never_gets_more_than_before_and_the_total_is_met(budget, data):
    layers, keep = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    scores = [torch.rand(2, 2, 12, generator=generator) for _ in range(layers)]
    wanted = [data.draw(st.floats(0.01, 9)) for _ in range(layers)]
    found = stages(budget, scores, keep, wanted)
    for before, after in pairwise(found):
        for old, new in zip(before, after, strict=False):
            assert bool((new <= old).all())
    total = torch.stack([counts.sum(dim=-1) for counts in found[-1]]).sum(dim=0)
    assert bool((total <= layers * 2 * keep + layers * 2).all())


def test_the_floor_is_kept_by_every_head():
    scores = [torch.ones(1, 2, 10), torch.zeros(1, 2, 10)]
    found = stages(Global(floor=0.5), scores, 4)
    assert found[-1][1].tolist() == [[2, 2]]
    assert sum(int(counts.sum()) for counts in found[-1]) == 16


def test_lavas_shares_shrink_as_in_the_worked_example():
    shares = [1.0, 1 / 3, 0.452260]
    budget = LayerShare(spread=False)
    scores = [torch.zeros(1, 1, 1000)] * 3
    found = stages(budget, scores, 100, shares)
    assert [[int(c[0, 0]) for c in stage] for stage in found] == [[300], [225, 75], [168, 56, 75]]


@pytest.mark.parametrize(
    ("asked", "keep", "width", "expected"),
    [
        ([4.0, 2.0, 1.0, 1.0], 100, 1000, [[400], [267, 133], [229, 114, 57], [200, 100, 50, 50]]),
        (
            [4.0, 2.0, 1.0, 1.0],
            100,
            150,
            [[150], [150, 150], [150, 150, 97], [150, 117, 67, 66]],
        ),
    ],
)
def test_cakes_shares_are_those_of_the_worked_example(asked, keep, width, expected):
    found = stages(
        LayerShare(rounding="even", spread=False), [torch.zeros(1, 1, width)] * 4, keep, asked
    )
    assert [[int(c[0, 0]) for c in stage] for stage in found] == expected


def test_what_integers_leave_over_goes_to_the_first_layers():
    wanted = [3.0, 3.0, 1.0]
    budget = LayerShare(rounding="even")
    ledger = budget.open()
    for room, asked in zip(rooms(4, 1, 25, 1000)[:3], wanted, strict=True):
        dealt = ledger.add(room, torch.zeros(1, 1, 1000), torch.tensor([asked]))
    assert [int(counts[0, 0]) for counts in dealt] == [43, 43, 14]


def test_layers_that_ask_for_nothing_share_evenly():
    found = stages(LayerShare(), [torch.zeros(1, 1, 50)] * 3, 10, [0.0, 0.0, 0.0])
    assert [int(counts[0, 0]) for counts in found[-1]] == [10, 10, 10]


def test_what_short_prompts_cannot_use_goes_to_other_layers():
    found = stages(LayerShare(), [torch.zeros(1, 1, 12)] * 3, 8, [10.0, 1.0, 1.0])
    assert [int(counts[0, 0]) for counts in found[-1]] == [12, 6, 6]
    lost = stages(LayerShare(spread=False), [torch.zeros(1, 1, 12)] * 3, 8, [10.0, 1.0, 1.0])
    assert [int(counts[0, 0]) for counts in lost[-1]] == [12, 2, 2]
