"""Tokens that give a text its structure: punctuation, blanks and symbols that repeat.

A token is structure where its text is not made of letters, marks and digits alone, where it occurs
`REPEATS` times or more in the document, and where it does not stand glued inside a word: the dash
of an identifier or a date has a letter or digit on both sides.

Source: NVIDIA/kvpress pull request 288 (structure demotion), which names the rule and its numbers.
Ours:   neighbours are those of the text, not of single tokens' decodings; marks count as letters,
        so that scripts which write vowels as marks are left alone.
"""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import groupby

REPEATS = 4
"""Times that a token has to occur in the document."""

STRUCTURE = "structure"
"""The name of the part: one unit for each such token, wherever it stands."""


def structure(
    text: str, ids: Sequence[int], places: Sequence[tuple[int, int]], first: int, last: int
) -> tuple[tuple[tuple[int, int], ...], ...]:
    """The units of the part among the tokens from `first` to `last`, in the order they occur.

    Args:
        text: what was encoded.
        ids: its tokens.
        places: the characters that each of them stands for, half-open; blanks may be left out.
    """
    times = Counter(ids[first:last])
    found: dict[int, list[int]] = {}
    for at in range(first, last):
        start, end = places[at]
        often = times[ids[at]] >= REPEATS
        if often and not _content(text[start:end].strip()) and not _is_glued(text, start, end):
            found.setdefault(ids[at], []).append(at)
    return tuple(tuple(_runs(where)) for where in found.values())


def _is_glued(text: str, start: int, end: int) -> bool:
    """Whether what stands there has no blank in it and a letter or digit on both sides."""
    if not 0 < start < end < len(text) or any(map(str.isspace, text[start:end])):
        return False
    return _content(text[start - 1]) and _content(text[end])


@cache
def _content(piece: str) -> bool:
    """Whether a piece of text is letters, marks and digits, and nothing else."""
    return bool(piece) and all(unicodedata.category(one)[0] in "LMN" for one in piece)


def _runs(places: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as half-open ranges."""
    runs = groupby(enumerate(places), key=lambda each: each[1] - each[0])
    members = [[place for _, place in run] for _, run in runs]
    return [(run[0], run[-1] + 1) for run in members]
