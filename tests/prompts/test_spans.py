"""Named parts of a prompt as ranges: what is accepted, moved, cut, and looked up."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtrim.errors import UsageError
from kvtrim.methods.unit_numbers import unit_numbers
from kvtrim.prompts.spans import (
    as_spans,
    join_spans,
    map_ends,
    per_prompt,
    per_row,
    require_within,
    without,
)


@st.composite
def parts(draw, length=40):
    """One part whose units have one or two ranges that do not overlap."""
    cuts = sorted(draw(st.sets(st.integers(0, length), min_size=2, max_size=12)))
    ranges = [pair for pair in pairwise(cuts) if draw(st.booleans())]
    ranges = draw(st.permutations(ranges))
    units = []
    while ranges:
        count = min(len(ranges), draw(st.integers(1, 2)))
        units.append([ranges.pop() for _ in range(count)])
    return units


def places(units):
    """Each unit as a set of places."""
    return [{at for start, end in unit for at in range(start, end)} for unit in units]


def test_a_unit_is_one_range_or_a_list_of_them():
    spans = as_spans({"shots": [(0, 4), [(4, 8), (20, 22)], [[9, 10]]], "question": []})
    assert spans["shots"] == (((0, 4),), ((4, 8), (20, 22)), ((9, 10),))
    assert spans["question"] == ()
    assert as_spans(spans) == spans


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([(3, 3)], r"\(3, 3\) is no range"),
        ([(5, 3)], "is no range"),
        ([(-1, 3)], "is no range"),
        ([(0, 9), (8, 12)], r"\(0, 9\) and \(8, 12\) overlap"),
        ([[(0, 4), (3, 6)]], "overlap"),
        ([(15, 21)], "beyond the 20 characters"),
        ([7], "7 is no unit"),
        ([()], "is no unit"),
        ([[1, 2, 3]], "is no unit"),
        (["text"], "is no unit"),
    ],
)
def test_mistakes_are_named(units, message):
    with pytest.raises(UsageError, match=message):
        as_spans({"shots": units}, 20, "characters")


def test_parts_may_overlap_each_other():
    assert as_spans({"context": [(0, 20)], "shots": [(0, 10), (10, 20)]}, 20)


def test_each_prompt_of_a_batch_has_its_own():
    one, two = {"shots": [(0, 2)]}, {"shots": [(1, 3)]}
    assert per_prompt(None) == []
    assert per_row(per_prompt(one), 3) == [as_spans(one)] * 3
    assert per_row(per_prompt([one, two]), 4) == [as_spans(s) for s in (one, one, two, two)]
    assert per_row(per_prompt([one, {}]), 2) == [as_spans(one), {}]
    with pytest.raises(UsageError, match="given for 2 prompts, the input has 3"):
        per_row(per_prompt([one, two]), 3)
    require_within(per_prompt([one, two]), [2, 3])
    with pytest.raises(UsageError, match="beyond the 2 tokens"):
        require_within(per_prompt([one, two]), [2, 2])


@settings(max_examples=100, deadline=None)
@given(parts(), st.integers(0, 40), st.integers(0, 40))
def test_cutting_the_middle_out_leaves_what_was_outside(units, one, other):
    start, end = sorted((one, other))
    left = without(as_spans({"a": units}), start, end)
    want = []
    for unit in places(units):
        stays = {at if at < start else at - (end - start) for at in unit if not start <= at < end}
        want += [stays] if stays else []
    assert places(left["a"]) == want


@settings(max_examples=60, deadline=None)
@given(parts(), parts(), st.integers(0, 9))
def test_joining_moves_the_second(first, second, shift):
    both = join_spans(
        as_spans({"a": first, "b": first}), as_spans({"a": second, "c": second}), 40 + shift
    )
    later = [{at + 40 + shift for at in unit} for unit in places(second)]
    assert places(both["a"]) == places(first) + later
    assert places(both["b"]) == places(first)
    assert places(both["c"]) == later


def test_units_without_places_vanish():
    spans = as_spans({"a": [(0, 2), (2, 3), [(3, 8), (8, 9)], (9, 10)]})
    assert map_ends(spans, lambda at: at // 2) == {"a": (((0, 1),), ((1, 4),), ((4, 5),))}
    assert map_ends(spans, lambda at: 0) == {"a": ()}


@settings(max_examples=100, deadline=None)
@given(parts(), st.lists(st.integers(0, 60), min_size=1, max_size=30))
def test_a_position_is_in_the_unit_that_holds_it(units, positions):
    numbers = unit_numbers(as_spans({"a": units}), "a", torch.tensor(positions).view(1, -1).int())
    for at, number in zip(positions, numbers[0].tolist(), strict=True):
        held_by = [i for i, unit in enumerate(places(units)) if at in unit]
        assert [number] == (held_by or [-1])
