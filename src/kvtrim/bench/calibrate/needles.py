"""From a riddle and filler to token ids, with the needle's place among them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from kvtrim.errors import UsageError
from kvtrim.prompts import encode_question, encode_text, frame
from kvtrim.tasks.haystack import Riddle


@dataclass(frozen=True)
class Planted:
    """A prompt as token ids, and where the needle is among them."""

    ids: list[int]
    needle: range
    steps: int  # tokens of the right answer


def plant(
    tokenizer: Any,
    riddle: Riddle,
    source: Iterator[str],
    length: int,
    depth: float,
    chat: bool | None = None,
) -> Planted:
    """A prompt of at most `length` tokens with the needle's paragraph at a depth from 0 to 1.

    The parts are tokenised one by one, so that it is known which tokens are the needle's.

    Raises:
        UsageError: no room for any filler.
    """
    around = frame(tokenizer, chat)

    def ids(text: str) -> list[int]:
        return encode_text(tokenizer, text) if text else []

    question = encode_question(tokenizer, around, riddle.question).ids
    question += ids(("" if around.after else "\n") + riddle.lead)
    before = ids("\n\n" + riddle.before)
    needle = ids((" " if riddle.before else "") + riddle.needle)
    after = ids(riddle.after + "\n\n")
    start = ids(around.before)
    room = length - sum(map(len, (question, before, needle, after, start)))
    hay = _fill(ids, source, room)
    at = round(depth * len(hay))
    head = [*start, *chain(*hay[:at]), *before]
    rest = [*after, *chain(*hay[at:]), *question]
    where = range(len(head), len(head) + len(needle))
    return Planted([*head, *needle, *rest], where, len(ids(" " + riddle.answer)))


def _fill(ids: Callable[[str], list[int]], source: Iterator[str], room: int) -> list[list[int]]:
    """Sentences as token ids, as many as there is room for."""
    hay: list[list[int]] = []
    while True:
        sentence = ids((" " if hay else "") + next(source))
        room -= len(sentence)
        if room < 0:
            break
        hay.append(sentence)
    if len(hay) < 2:
        raise UsageError("no room for filler around the needle; ask for a larger --length")
    return hay
