"""Where a prompt says what an answer needs: as a user gives it, or the answer's own words."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from kvtrim.errors import UsageError
from kvtrim.report.format import visible

_MOST = 50  # places that are marked of one text
_LEAST = 5  # letters of a word that says something by itself
_COMMON = 8  # places of a word that says nothing
_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")


@dataclass(frozen=True)
class Evidence:
    """A stretch of the prompt, in tokens, that an answer needs."""

    start: int
    end: int
    given: bool  # by the user; else it is what the answer says


class Pieces:
    """The pieces of a prompt that its tokens stand for, and which tokens a stretch of it takes."""

    def __init__(self, pieces: Sequence[str]):
        self.text = "".join(pieces)
        self._ends = list(accumulate(map(len, pieces)))

    def tokens(self, start: int, end: int) -> tuple[int, int]:
        """The tokens of these characters, half-open; a character of several tokens takes all."""
        first = bisect_right(self._ends, start)
        while first and self._ends[first - 1] == (self._ends[first - 2] if first > 1 else 0):
            first -= 1  # the first bytes of a character have no text of their own
        return first, bisect_right(self._ends, end - 1) + 1


def find(pieces: Sequence[str], texts: Sequence[str]) -> list[Evidence]:
    """Every place of these texts, whatever their case and where their lines break.

    Raises:
        UsageError: one of them does not stand in the prompt, or says nothing.
    """
    prompt, found = Pieces(pieces), []
    for text in texts:
        places = _places(prompt.text, text) if text.strip() else []
        if not places:
            raise UsageError(f"the evidence {visible(text)[:80]!r} does not stand in the document")
        found += [Evidence(*prompt.tokens(*place), True) for place in places]
    return found


def find_answer(pieces: Sequence[str], answer: str, question: str) -> list[Evidence]:
    """Where the prompt says what an answer says.

    Of the answer's words, the longest runs that stand in the prompt before the question: of
    several words, not all of them the question's; or one word, at least 5 letters long or with a
    digit, which the question does not have and the prompt has in few places.
    """
    prompt = Pieces(pieces)
    asked = {word.casefold() for word in _WORD.findall(question)}
    end = prompt.text.rfind(question) if question else -1
    text = prompt.text[:end] if end >= 0 else prompt.text
    words, found, at = list(_WORD.finditer(answer)), [], 0
    while at < len(words):
        places, taken = [], 1
        for last in range(at, len(words)):
            there = _places(text, answer[words[at].start() : words[last].end()])
            if not there:
                break
            places, taken = there, last + 1 - at
        run = [word.group() for word in words[at : at + taken]]
        if places and len(places) <= _COMMON and _says(run, asked):
            found += [Evidence(*prompt.tokens(*place), False) for place in places]
        at += taken
    return sorted(set(found), key=lambda each: each.start)


def _says(run: list[str], asked: set[str]) -> bool:
    """Whether words tell something that the question does not."""
    new = [word for word in run if word.casefold() not in asked]
    return any(len(word) >= _LEAST or any(map(str.isdigit, word)) for word in new)


def _places(text: str, wanted: str) -> list[tuple[int, int]]:
    """Where it stands as whole words, at most `_MOST` of them."""
    pattern = r"\s+".join(map(re.escape, wanted.split()))
    around = (r"(?<!\w)" if re.match(r"\w", wanted.strip()) else "") + pattern
    around += r"(?!\w)" if re.search(r"\w$", wanted.strip()) else ""
    found = re.finditer(around, text, re.IGNORECASE)
    return [place.span() for place, _ in zip(found, range(_MOST), strict=False)]
