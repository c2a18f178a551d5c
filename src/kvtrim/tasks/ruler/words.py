"""RULER's words, numbers and codes, and the two tasks that count words.

Source: NVIDIA/RULER, scripts/data/synthetic/common_words_extraction.py and
freq_words_extraction.py; words from the package `wonderwords`.
Ours:   where a list needs more words than the package has, adjective-noun pairs follow (official:
        a downloaded list of English words). The three words asked for by `fwe` are strictly more
        frequent than the fourth, whatever the length.
"""

import math
import random
import string
import uuid
from collections.abc import Callable
from functools import cache
from importlib.resources import files

from kvtrim.errors import UsageError
from kvtrim.prompts.document import SHOTS, Document
from kvtrim.tasks.base import Request, Sample

Draw = random.Random
_LIST = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
_ASK_LIST = "\nQuestion: What are the 10 most common words in the above list?"
_LEAD_LIST = " Answer: The top 10 words that appear most often in the list are:"
_CODED = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. "
)
_ASK_CODED = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
_LEAD_CODED = (
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)
_COMMON = 10  # words asked for by cwe
_SHORT = 4096  # below this length, lists repeat their words less often
LEAST_CODED = 100  # below, the third and fourth most frequent code may tie


@cache
def words(kind: str) -> tuple[str, ...]:
    """The nouns, adjectives or verbs of `wonderwords`."""
    try:
        found = files("wonderwords").joinpath(f"assets/{kind}list.txt").read_text("utf-8")
    except (ModuleNotFoundError, FileNotFoundError):
        raise UsageError(
            "RULER's words come from wonderwords: pip install 'kvtrim[eval]'"
        ) from None
    return tuple(sorted({word for word in found.splitlines() if word}))


def pair(draw: Draw) -> str:
    """An adjective and a noun, as "quiet-harbour"."""
    return f"{draw.choice(words('adjective'))}-{draw.choice(words('noun'))}"


def number(draw: Draw) -> str:
    """Seven digits."""
    return str(draw.randint(10**6, 10**7 - 1))


def code(draw: Draw) -> str:
    """A UUID."""
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def different(make: Callable[[Draw], str], draw: Draw, taken: set[str]) -> str:
    """One that was not drawn before."""
    while (one := make(draw)) in taken:
        pass
    taken.add(one)
    return one


def common(request: Request, draw: Draw, count: int) -> Sample:
    """cwe: ten words of a numbered list occur often, `count` others seldom; an example before."""
    short = request.length < _SHORT
    listed, right = _numbered_list(draw, 20 if short else 40, *((3, 1) if short else (10, 3)))
    answer = _answer_list(right)
    shot = f"{_LIST}{listed}{_ASK_LIST}{_LEAD_LIST} {answer}\n"
    listed, right = _numbered_list(draw, _COMMON + count, *((6, 1) if short else (30, 3)))
    return Sample(
        id="",
        document=Document(shot + _LIST + listed, {SHOTS: [(0, len(shot))]}),
        question=_ASK_LIST,
        answers=(_answer_list(right),),
        prefix=_LEAD_LIST,
        extra={"expected": right},
    )


def frequent(request: Request, answer: int, draw: Draw, count: int) -> Sample:
    """fwe: made-up words, their frequencies falling with the square of their rank (zeta, 2)."""
    size = max(8, (request.length - answer) // 50)
    taken: set[str] = set()
    codes = [different(_code_word, draw, taken) for _ in range(size)]
    often = [int(count * rank**-2 / (math.pi**2 / 6)) for rank in range(1, size + 1)]
    named = ["...", *codes[1:]]  # the most frequent one is noise
    text = [word for word, times in zip(named, often, strict=True) for _ in range(times)]
    draw.shuffle(text)
    right = named[1:4]
    return Sample(
        id="",
        document=Document(_CODED + " ".join(text)),
        question=_ASK_CODED,
        answers=(" ".join(right),),
        prefix=_LEAD_CODED,
        extra={"expected": right},
    )


def _numbered_list(draw: Draw, count: int, often: int, seldom: int) -> tuple[str, list[str]]:
    """`count` different words as a numbered list, the first ten `often` times; and those ten."""
    known = sorted({*words("noun"), *words("adjective"), *words("verb")})
    chosen = draw.sample(known, min(count, len(known)))
    taken = set(chosen)
    chosen += [different(pair, draw, taken) for _ in range(count - len(chosen))]
    listed = chosen[:_COMMON] * often + chosen[_COMMON:] * seldom
    draw.shuffle(listed)
    return _answer_list(listed), chosen[:_COMMON]


def _answer_list(listed: list[str]) -> str:
    return " ".join(f"{place}. {word}" for place, word in enumerate(listed, 1))


def _code_word(draw: Draw) -> str:
    return "".join(draw.choices(string.ascii_lowercase, k=6))
