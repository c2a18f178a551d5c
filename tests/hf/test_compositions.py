"""A small part of the random compositions; `python experiments/compose.py` judges thousands."""

import pytest

import compositions

SEED, CASES, BLOCK = 0, 24, 6


@pytest.mark.parametrize("first", range(0, CASES, BLOCK))
def test_whatever_is_composed_batches_equal_alone_and_evicting_equals_masking(first):
    tally = compositions.run(SEED, range(first, first + BLOCK))
    assert not tally.faults, [
        f"{wrong}: {compositions.describe(compositions.draw(SEED, number)[0])}"
        for number, wrong in tally.faults
    ]
    assert tally.right > BLOCK / 2, "too many cases are refused to prove anything"
