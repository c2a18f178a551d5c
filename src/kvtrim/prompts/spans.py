"""Named parts of a prompt: the system message, each shot, each sentence, the question.

A part has a name and units: the examples of a prompt are one part, each example a unit. A unit is
one or more half-open ranges, (0, 40) or [(0, 40), (200, 220)], counted in characters of a
`Document` and in tokens of a `Cache`. Units of one part never overlap; two parts may.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import groupby, pairwise
from typing import Any

from kvtrim.errors import UsageError

Spans = Mapping[str, tuple[tuple[tuple[int, int], ...], ...]]
"""The named parts of one prompt: name -> units -> half-open ranges of positions."""

Given = Mapping[str, Sequence[Any]]
"""Spans as a user writes them: a unit is one range or a list of ranges."""

REPEATS = 4
"""Times that a token has to occur in the document."""

STRUCTURE = "structure"
"""The name of the part: one unit for each such token, wherever it stands."""


def as_spans(given: Given, length: int | None = None, counted: str = "tokens") -> Spans:
    """Spans in their one form.

    Args:
        length: how long the prompt is, where that is known.
        counted: what the ranges count, for the message.

    Raises:
        UsageError: a range is empty or out of range, or two of one part overlap.
    """
    spans: dict[str, tuple[tuple[tuple[int, int], ...], ...]] = {}
    for name, units in given.items():
        spans[name] = tuple(_unit(name, unit) for unit in units)
        ordered = sorted(piece for unit in spans[name] for piece in unit)
        for start, end in ordered:
            if not 0 <= start < end:
                raise UsageError(
                    f"spans of {name!r}: ({start}, {end}) is no range; use 0 <= start < end"
                )
            if length is not None and end > length:
                raise UsageError(
                    f"spans of {name!r}: ({start}, {end}) reaches beyond "
                    f"the {length} {counted} there are"
                )
        for first, second in pairwise(ordered):
            if second[0] < first[1]:
                raise UsageError(
                    f"spans of {name!r}: {first} and {second} overlap; cut them apart"
                )
    return spans


def _unit(name: str, unit: Any) -> tuple[tuple[int, int], ...]:
    """One range or a list of them, as ranges."""
    try:
        pieces = [unit] if isinstance(unit[0], int) else unit
        return tuple((int(start), int(end)) for start, end in pieces)
    except (TypeError, ValueError, IndexError, KeyError):
        raise UsageError(
            f"spans of {name!r}: {unit!r} is no unit; write (start, end) or a list of such ranges"
        ) from None


def have_question(prompts: Sequence[Spans]) -> bool:
    """Whether prompts are read together with their question: nobody says so, or one names it.

    A part without units is none: what a question was cut out of still has its name.
    """
    return not prompts or any(own.get("question") for own in prompts)


def per_prompt(given: Given | Sequence[Given] | None) -> list[Spans]:
    """The spans of each prompt of a batch; of one prompt if they are given once."""
    if given is None:
        return []
    return [as_spans(one) for one in ([given] if isinstance(given, Mapping) else given)]


def per_row(spans: Sequence[Spans], rows: int) -> list[Spans]:
    """One mapping per prompt; where prompts are repeated (beams, samples) each goes along.

    Raises:
        UsageError: spans for another number of prompts.
    """
    if spans and rows % len(spans):
        raise UsageError(
            f"spans were given for {len(spans)} prompts, the input has {rows}; give one mapping "
            "for all prompts or a list with one for each"
        )
    return [one for one in spans for _ in range(rows // len(spans))]


def require_within(spans: Sequence[Spans], lengths: Sequence[int]) -> None:
    """Refuse spans that reach beyond their prompts.

    Raises:
        UsageError: naming the range.
    """
    for one, length in zip(spans, lengths, strict=False):
        as_spans(one, length)


def join_spans(first: Spans, second: Spans, shift: int) -> Spans:
    """Spans of a text and of another `shift` further on; a part's units follow each other."""
    behind = map_ends(second, lambda at: at + shift)
    return {name: first.get(name, ()) + behind.get(name, ()) for name in {**first, **behind}}


def without(spans: Spans, start: int, end: int) -> Spans:
    """What is left when everything from `start` to `end` is cut out; empty units vanish."""

    def move(at: int) -> int:
        return at if at <= start else max(start, at - (end - start))

    return map_ends(spans, move)


def map_ends(spans: Spans, move: Callable[[int], int]) -> Spans:
    """Both ends of every range moved; ranges and units that became empty are left out."""
    found = {}
    for name, units in spans.items():
        pieces = [[(move(start), move(end)) for start, end in unit] for unit in units]
        whole = [tuple(piece for piece in unit if piece[0] < piece[1]) for unit in pieces]
        found[name] = tuple(unit for unit in whole if unit)
    return found


def structure(
    text: str, ids: Sequence[int], places: Sequence[tuple[int, int]], first: int, last: int
) -> tuple[tuple[tuple[int, int], ...], ...]:
    """The units of `structure` among the tokens from `first` to `last`, in the order they occur.

    Structure is punctuation, blanks and symbols that repeat. A token is that where its text is not
    made of letters, marks and digits alone, where it occurs `REPEATS` times or more in the
    document, and where it does not stand glued inside a word: the dash of an identifier or a date
    has a letter or digit on both sides.

    Source: NVIDIA/kvpress pull request 288 (structure demotion), which names the rule and its
    numbers. Ours: neighbours are those of the text, not of single tokens' decodings; marks count
    as letters, so that scripts which write vowels as marks are left alone.

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
