"""The number an answer ends with, read from free text.

Numbers are compared as numbers: "1,234.50", "$1234.5" and "1 234.5" (with a narrow blank) are the
same. A minus sign counts if it stands right before the number or its currency, and not behind
something that it could be subtracted from: "20-12" holds 20 and 12.
"""

import re
from decimal import Decimal

_SIGNS = {ord(sign): "-" for sign in "\u2212\u2010\u2011\u2012\u2013\ufe63"}
_WIDE = {code: chr(code - 0xFEE0) for code in range(0xFF04, 0xFF1A)}  # from dollar to nine
_ORDINARY = {**_SIGNS, **_WIDE}

_GROUPS = "|".join(rf"[0-9]{{1,3}}(?:{blank}[0-9]{{3}})+" for blank in ",\u00a0\u2009\u202f")
_SIZE = rf"(?:(?:{_GROUPS})(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9.])\.[0-9]+"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\].%])-)?(?:[$\u20ac\u00a3\u00a5\u20b9] ?(?P<inner>-)?)?(?P<size>{_SIZE})"
)
_STATED = re.compile(r"the answer is[\s:*_`\"'(\[{\\$]*(?:boxed\{)?", re.IGNORECASE)


def numbers(text: str) -> list[Decimal]:
    """Every number of a text, in order."""
    return [_value(found) for found in _NUMBER.finditer(text.translate(_ORDINARY))]


def stated_number(text: str) -> Decimal | None:
    """The number right after the first "The answer is" that one follows, in any case; or None."""
    text = text.translate(_ORDINARY)
    for phrase in _STATED.finditer(text):
        if found := _NUMBER.match(text, phrase.end()):
            return _value(found)
    return None


def final(text: str) -> Decimal | None:
    """The stated number, else the last one, else None."""
    said = stated_number(text)
    return said if said is not None else next(reversed(numbers(text)), None)


def _value(found: re.Match[str]) -> Decimal:
    size = Decimal(re.sub(r"[^0-9.]", "", found["size"]))
    return size.copy_negate() if bool(found["sign"]) != bool(found["inner"]) else size
