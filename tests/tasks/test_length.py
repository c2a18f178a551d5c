"""Prompts of the length asked for, found with few tokenisations."""

import pytest

from kvtrim.errors import UsageError
from kvtrim.prompts.document import Document
from kvtrim.tasks import Request, Sample
from kvtrim.tasks.length import largest


class Counter:
    """Tokens of a text, and how often they were counted."""

    def __init__(self):
        self.calls = 0

    def __call__(self, text):
        self.calls += 1
        return len(text)


def search(length, unit, least=1, most=None, answer=10):
    tokens = Counter()
    made = []

    def make(count):
        made.append(count)
        return Sample(str(count), Document("h" * 7 + unit(count)), "q", ("a",), "p")

    request = Request(lambda _: [], tokens, length)
    found = largest(make, request, answer, least, most)
    return int(found.id), tokens.calls, made


@pytest.mark.parametrize("length", [40, 41, 49, 50, 500, 4096, 131072])
@pytest.mark.parametrize("each", [1, 7, 20])
def test_it_fits_and_little_is_left_over(length, each):
    count, calls, _ = search(length, lambda count: "x" * (each * count))
    left = length - 10 - (7 + each * count + 2)
    assert 0 <= left < max(each, length / 256)
    assert calls <= 6


def test_units_of_different_lengths():
    """Every tenth unit is twenty times longer than the others."""
    count, calls, _ = search(
        20000, lambda n: "".join("x" * (1 + 19 * (i % 10 == 0)) for i in range(n))
    )
    used = 9 + sum(1 + 19 * (i % 10 == 0) for i in range(count)) + 10
    assert 20000 - 100 < used <= 20000 and calls <= 8


@pytest.mark.parametrize("unit", [lambda n: "x" * n**2, lambda n: "x" * int(99 * n**0.5)])
def test_lengths_that_do_not_grow_evenly(unit):
    count, calls, _ = search(3000, unit)
    assert 2700 < 9 + len(unit(count)) + 10 <= 3000 and calls <= 17


def test_no_more_units_than_there_are():
    assert search(4096, lambda count: "x" * count, most=17)[0] == 17
    assert search(4096, lambda count: "x" * count, least=17, most=17)[0] == 17


def test_a_length_without_room_is_refused_with_one_that_has_it():
    with pytest.raises(UsageError, match="ask for at least 69"):
        search(60, lambda count: "x" * count, least=50)
    assert search(69, lambda count: "x" * count, least=50)[0] == 50
