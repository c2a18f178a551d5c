from decimal import Decimal

import pytest

from kvtrim.tasks.numbers import final, numbers, stated_number


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        ("no digits at all", []),
        ("18", ["18"]),
        ("It is 18.", ["18"]),
        ("$1,234.50.", ["1234.50"]),
        ("1,234,567 people", ["1234567"]),
        ("3,4 and 12,34", ["3", "4", "12", "34"]),
        ("1,2345", ["1", "2345"]),
        ("2,125,", ["2125"]),
        ("1\u202f234\u202f567 and 65\u00a0960", ["1234567", "65960"]),
        ("-10", ["-10"]),
        ("\u221210 degrees", ["-10"]),
        ("minus: \uff0d3", ["-3"]),
        ("-$5 or $-5 or - 5", ["-5", "-5", "5"]),
        ("x=-5, (-6), **-7**", ["-5", "-6", "-7"]),
        ("20-12=8", ["20", "12", "8"]),
        ("pages 10\u201312", ["10", "12"]),
        ("(4+5)-3", ["4", "5", "3"]),
        ("100%-25%", ["100", "25"]),
        ("covid-19", ["19"]),
        ("0.5, .5 and 5.", ["0.5", ".5", "5"]),
        ("wait...5", ["5"]),
        ("\u20ac5, \u00a36, \u20b97, 8\u20ac, US$9", ["5", "6", "7", "8", "9"]),
        ("\uff11\uff18", ["18"]),
        ("1.234.567", ["1.234", "567"]),
        ("50% of 7km", ["50", "7"]),
    ],
)
def test_numbers_are_read_in_order_with_their_signs(text, found):
    assert numbers(text) == [Decimal(one) for one in found]


@pytest.mark.parametrize(
    ("text", "said", "last"),
    [
        ("The answer is 18.", "18", "18"),
        ("The answer is 18", "18", "18"),
        ("The answer is $1,800.00.", "1800", "1800"),
        ("the answer is: **18** because 3 x 6", "18", "18"),
        ("The answer is \u22123.", "-3", "-3"),
        ("The answer is -$3.", "-3", "-3"),
        ("So the answer is $\\boxed{72}$ in 2 steps", "72", "72"),
        ("The answer is 5. The answer is 6.", "5", "5"),
        ("The answer is unknown. No, the answer is 6.", "6", "6"),
        ("The answer is that he has 5 apples and 3 pears", None, "3"),
        ("5 + 3 = 8 apples.", None, "8"),
        ("nothing", None, None),
        ("", None, None),
    ],
)
def test_a_stated_number_comes_before_the_last_one(text, said, last):
    assert stated_number(text) == (None if said is None else Decimal(said))
    assert final(text) == (None if last is None else Decimal(last))


def test_numbers_of_any_length_keep_every_digit():
    assert final("-" + "1" * 60) == Decimal("-" + "1" * 60)
    assert final("-0") == final("0.00")
