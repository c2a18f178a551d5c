"""RULER's needles: keys with magic values, in noise, in essays, or among other needles.

Source: NVIDIA/RULER, scripts/data/synthetic/niah.py and constants.py.
Ours:   keys and values of one prompt are all different; sentences end where a blank follows their
        full stop (official: the tokenizer of nltk); no leading blank where a needle comes first.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from kvtrim.prompts.document import Document
from kvtrim.tasks.base import Request, Sample
from kvtrim.tasks.ruler.words import Draw, code, different, number, pair

ANSWER = 128  # new tokens
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_KINDS: dict[str, Callable[[Draw], str]] = {"words": pair, "numbers": number, "uuids": code}
_DEPTHS = [round(100 * step / 39) for step in range(40)]  # percent of the sentences


@dataclass(frozen=True)
class Needles:
    """One of the eight tasks."""

    hay: str  # noise, essays, needles
    keys: int = 1
    values: int = 1  # of each key
    asked: int = 1  # keys
    key: str = "words"
    value: str = "numbers"

    @property
    def one(self) -> bool:
        """Is a single value asked for?"""
        return self.asked * self.values == 1


def sample(task: Needles, request: Request, draw: Draw, count: int) -> Sample:
    """A prompt with `count` words of essays, sentences of noise, or other needles."""
    taken: set[str] = set()

    def fresh(kind: str) -> str:
        return different(_KINDS[kind], draw, taken)

    def plant(key: str, value: str) -> str:
        return f"One of the special magic {task.value} for {key} is: {value}."

    found = {
        fresh(task.key): [fresh(task.value) for _ in range(task.values)] for _ in range(task.keys)
    }
    needles = [plant(key, value) for key, values in found.items() for value in values]
    draw.shuffle(needles)
    asked = draw.sample(list(found), task.asked)
    if task.hay == "essays":
        context = _among(_essay_sentences(request, count), needles, draw)
    else:
        hay = [NOISE] * count
        if task.hay == "needles":
            hay = [plant(fresh(task.key), fresh(task.value)) for _ in range(count)]
        for place in sorted(draw.sample(range(count), len(needles)), reverse=True):
            hay.insert(place, needles.pop())
        context = "\n".join(hay)
    return _ask(task, context, asked, [value for key in asked for value in found[key]])


def _ask(task: Needles, context: str, keys: list[str], values: list[str]) -> Sample:
    """The official wording, in the singular where one value is asked for."""
    query = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    kind = task.value.removesuffix("s") if task.one else task.value
    some, are = ("A", "is") if task.one else ("Some", "are")
    every = "is the" if task.one else "are all the"
    before = (
        f"{some} special magic {kind} {are} hidden within the following text. Make sure to "
        f"memorize it. I will quiz you about the {kind} afterwards.\n"
    )
    named = f"special magic {kind} for {query} mentioned in the provided text"
    return Sample(
        id="",
        document=Document(before + context),
        question=f"\nWhat {every} {named}?",
        answers=(", ".join(values),),
        prefix=f" The {named} {are}",
        extra={"expected": values},
    )


def _among(hay: list[str], needles: list[str], draw: random.Random) -> str:
    """Sentences with needles between them, at different depths."""
    places = sorted(int(len(hay) * depth / 100) for depth in draw.sample(_DEPTHS, len(needles)))
    pieces: list[str] = []
    start = 0
    for place, needle in zip(places, needles, strict=True):
        pieces += [*hay[start:place], needle]
        start = place
    return " ".join([*pieces, *hay[start:]])


def _essay_sentences(request: Request, count: int) -> list[str]:
    """The first `count` words of the essays, again and again where they end, as sentences."""
    text = _essay_words(tuple(row["text"] for row in request.rows("essays")))
    repeated = text * (count // len(text)) + text[: count % len(text)]
    return re.split(r"(?<=[.!?])\s+", " ".join(repeated))


@cache
def _essay_words(texts: tuple[str, ...]) -> list[str]:
    return " ".join(texts).split()
