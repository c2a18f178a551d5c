"""What `kvtrim.select` refuses before it scores anything."""

import pytest
import torch

import kvtrim
from kvtrim.errors import UsageError


def heads(*shape):
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("queries", "keys", "values"),
    [
        ([], [], []),
        (heads(4, 0, 8), heads(2, 0, 8), heads(2, 0, 8)),
        (heads(4, 9, 8), heads(0, 9, 8), heads(0, 9, 8)),
        (heads(4, 9, 8), heads(2, 9, 6), heads(2, 9, 6)),
        (heads(4, 9, 8), heads(3, 9, 8), heads(3, 9, 8)),
        ([heads(9, 8)] * 2, [heads(9, 8)] * 2, [heads(9, 8)] * 2),
        (  # layers of another length
            [heads(4, 9, 8), heads(4, 8, 8)],
            [heads(2, 9, 8), heads(2, 8, 8)],
            [heads(2, 9, 8), heads(2, 8, 8)],
        ),
        (  # and of another number of heads
            [heads(4, 9, 8), heads(2, 9, 8)],
            [heads(2, 9, 8), heads(2, 9, 8)],
            [heads(2, 9, 8), heads(2, 9, 8)],
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(queries, keys, values):
    with pytest.raises(UsageError, match=r"do not fit|there are no queries"):
        kvtrim.select("snapkv", queries, keys, values, keep=4, window=2)


def test_values_may_be_of_another_width():
    kept = kvtrim.select("knorm", heads(4, 9, 8), heads(2, 9, 8), heads(2, 9, 5), keep=4)
    assert [len(positions) for positions in kept[0]] == [4, 4]
