"""Needle in a haystack: is a sentence found wherever it stands in a long text?

Source: gkamradt/LLMTest_NeedleInAHaystack (needle, essays); dongwonjo/FastKV of February 2025
        (prompt, question, new tokens, depths, score). LaProx (arXiv 2605.07234, figure 3)
        measures three variants, 1 needle 1 target, several needles 1 target, several needles
        several targets; its needles are not published: those here are our own.
Ours:   the needle goes behind the last sentence that ends before its depth, counted in characters
        of the text; the official code looks for token ids of a full stop, which are those of two
        vocabularies. The chat template is used where there is one (official: for Mistral alone):
        an instruct model asked without it may end its answer before it begins. No token of a chat
        format ("<|im_start|>") in front of the prompt, no start token in front of the needle.
        Punctuation does not count in the score. The essays begin at a sentence drawn from the
        seed.

One length for each request, every depth in turn: run several lengths to draw a heat map, whose
columns are `length` and `depth` of each sample's group. `niah-words` needs no essays: filler is
made, and the answer is a pair of words or a pastime, for small models.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice

from kvtrim.prompts.document import Document
from kvtrim.tasks import haystack, scorers
from kvtrim.tasks.base import Request, Sample, Task
from kvtrim.tasks.length import MADE, largest

SOURCE = "gkamradt/LLMTest_NeedleInAHaystack, dongwonjo/FastKV"
VARIANTS = f"{SOURCE}, variants of arXiv 2605.07234"
DEPTHS = (0, 11, 22, 33, 44, 56, 67, 78, 89, 100)  # percent of the text in front of the needle
_FIRST = "San Francisco", "eat a sandwich and sit in Dolores Park on a sunny day"
_OTHERS = (
    ("Kyoto", "stroll past wooden temples beneath red maple leaves"),
    ("Lisbon", "ride the yellow tram uphill and listen to fado"),
    ("Reykjavik", "bathe outdoors between snow and steaming lava rocks"),
    ("Nairobi", "watch giraffes graze at dawn from an old railway carriage"),
    ("Quebec", "skate along frozen canals with maple syrup candy"),
    ("Hanoi", "sip egg coffee while street barbers cut hair"),
    ("Seville", "peel oranges under arcades until guitars begin"),
    ("Auckland", "sail around green volcanoes before breakfast"),
)
_NEEDLES, _TARGETS = 5, 3
_BEFORE = "This is a very long story book: <book> "
_AFTER = " </book>.\n Based on the content of the book, Question: {0}\nAnswer:"


@dataclass(frozen=True)
class Search:
    """What is planted in a text, and how it is asked for."""

    needles: tuple[str, ...]  # the first stands at the sample's depth, the rest evenly apart
    before: str  # the text in front of the haystack
    question: str
    answers: tuple[str, ...]  # all are asked for
    prefix: str = ""


def _sight(city: str, deed: str) -> str:
    return f"The best thing to do in {city} is {deed}."


def _single(_: random.Random) -> Search:
    city, deed = _FIRST
    return _search((_FIRST,), f"What is the best thing to do in {city}?", (deed,))


def _one_of_several(draw: random.Random) -> Search:
    chosen = tuple(draw.sample([_FIRST, *_OTHERS], _NEEDLES))
    city, deed = chosen[0]
    return _search(chosen, f"What is the best thing to do in {city}?", (deed,))


def _several_of_several(draw: random.Random) -> Search:
    chosen = tuple(draw.sample([_FIRST, *_OTHERS], _NEEDLES))
    asked = chosen[::2][:_TARGETS]  # every other one, so that they are far apart
    cities = [city for city, _ in asked]
    named = f"{', '.join(cities[:-1])}, and {cities[-1]}"
    question = f"What are the best things to do in {named}?"
    return _search(chosen, question, tuple(deed for _, deed in asked))


def _search(
    needles: tuple[tuple[str, str], ...], question: str, answers: tuple[str, ...]
) -> Search:
    planted = tuple(_sight(*one) for one in needles)
    return Search(planted, _BEFORE, _AFTER.format(question), answers)


def _words(draw: random.Random) -> Search:
    one = haystack.riddle("copy", draw)
    planted = f"{one.before} {one.needle}{one.after}"
    return Search((planted,), "", f"\n\n{one.question}\n", (one.answer,), one.lead)


def _essays(request: Request, draw: random.Random) -> Iterator[str]:
    text = "\n".join(row["text"] for row in request.rows("essays"))
    return haystack.sentences(text, draw)


def _filler(_: Request, draw: random.Random) -> Iterator[str]:
    return haystack.filler(draw)


def _samples(
    name: str,
    search: Callable[[random.Random], Search],
    source: Callable[[Request, random.Random], Iterator[str]],
    new_tokens: int,
    request: Request,
) -> Iterator[Sample]:
    for depth, turn in _places(MADE if request.limit is None else request.limit):
        draw = random.Random(f"{request.seed} {name} {turn}")  # one text for all depths
        wanted = search(draw)
        hay, rest = [], source(request, draw)

        def make(
            count: int,
            wanted: Search = wanted,
            hay: list[str] = hay,
            rest: Iterator[str] = rest,
            depth: int = depth,
            turn: int = turn,
        ) -> Sample:
            hay.extend(islice(rest, max(0, count - len(hay))))
            return Sample(
                id=f"{request.length}/{depth}/{turn}",
                document=_plant(wanted, hay[:count], depth),
                question=wanted.question,
                answers=("; ".join(wanted.answers),),
                prefix=wanted.prefix,
                group={"length": request.length, "depth": depth},
                extra={"expected": list(wanted.answers)},
            )

        yield largest(make, request, new_tokens, 2)


def _places(limit: int) -> Iterator[tuple[int, int]]:
    """Depths in turn, with the number of the turn; fewer than all of them are spread evenly."""
    if 0 < limit < len(DEPTHS):
        last = (len(DEPTHS) - 1) / max(1, limit - 1)
        yield from ((DEPTHS[round(step * last)], 0) for step in range(limit))
        return
    for number in range(limit):
        turn, place = divmod(number, len(DEPTHS))
        yield DEPTHS[place], turn


def _plant(wanted: Search, hay: list[str], depth: int) -> Document:
    """The haystack with its needles, each a line between two sentences."""
    ends = list(accumulate(len(sentence) + 1 for sentence in hay))
    apart = 100 / len(wanted.needles)
    depths = [
        depth if not number else (depth + number * apart) % 100
        for number in range(len(wanted.needles))
    ]
    places = [sum(end <= one / 100 * ends[-1] for end in ends) for one in depths]
    text, start = wanted.before, 0
    spans: list[tuple[int, int]] = []
    for place, needle in sorted(zip(places, wanted.needles, strict=True)):
        text += " ".join(hay[start:place])
        text += "\n" if text else ""
        spans.append((len(text), len(text) + len(needle)))
        text += needle + "\n"
        start = place
    return Document(text + " ".join(hay[start:]), {"needles": spans})


def _score(answer: str, sample: Sample) -> float:
    expected = sample.extra["expected"]
    return sum(scorers.word_overlap(answer, (one,)) for one in expected) / len(expected)


def _task(
    name: str,
    about: str,
    search: Callable[[random.Random], Search],
    new_tokens: int = 50,
    words: bool = False,
    source: str = VARIANTS,
) -> Task:
    return Task(
        name=name,
        version=1,
        about=about,
        source=source,
        metric="words found",
        max_new_tokens=new_tokens,
        samples=partial(_samples, name, search, _filler if words else _essays, new_tokens),
        score=_score,
        data=() if words else ("essays",),
    )


TASKS: tuple[Task, ...] = (
    _task("niah", "One sentence in essays, asked for.", _single, source=SOURCE),
    _task("niah-multi-single", "One of five such sentences in essays.", _one_of_several),
    _task("niah-multi-multi", "Three of five such sentences.", _several_of_several, 128),
    _task(
        "niah-words",
        "A pair of words or a pastime in made-up text.",
        _words,
        24,
        words=True,
        source="ours",
    ),
)
