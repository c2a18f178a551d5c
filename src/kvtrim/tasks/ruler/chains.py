"""RULER's variable tracking: a chain of assignments in noise, after a worked example.

Source: NVIDIA/RULER, scripts/data/synthetic/variable_tracking.py and constants.py.
Ours:   the spelling of newer versions ("assigned", once "assgined"); every example is drawn anew
        (official: one, its names and value exchanged); at lengths below 1,500 the example shrinks
        to a third of the prompt, instead of 500 tokens.
"""

import string
from dataclasses import replace
from functools import partial

from kvtrim.prompts.document import SHOTS, Document
from kvtrim.tasks.base import Request, Sample
from kvtrim.tasks.length import largest
from kvtrim.tasks.ruler.needles import NOISE
from kvtrim.tasks.ruler.words import Draw, different

ANSWER = 30  # new tokens
LEAST = 5  # sentences of noise, one for each variable
_HOPS = 4
_EXAMPLE = 500  # tokens


def sample(request: Request, seed: str) -> Sample:
    """The largest prompt, worked example included; the same for the same seed."""
    example = partial(_fresh, f"{seed} example", 3, "")
    short = request.tokens(_answer(example(LEAST)))
    room = max(short, min(_EXAMPLE, request.length // 3))
    shot = largest(example, replace(request, length=room), 0, LEAST)
    text = f"{_answer(shot)}\n\n"
    return largest(partial(_fresh, seed, 5, text), request, ANSWER, LEAST)


def _answer(shot: Sample) -> str:
    return f"{shot.document.text}{shot.question}{shot.prefix} {shot.answers[0]}"


def _fresh(seed: str, letters: int, example: str, count: int) -> Sample:
    return _track(Draw(seed), letters, example, count)


def _track(draw: Draw, letters: int, example: str, count: int) -> Sample:
    """One chain among `count` sentences of noise, behind an example."""

    def name(draw: Draw) -> str:
        return "".join(draw.choices(string.ascii_uppercase, k=letters))

    taken: set[str] = set()
    names = [different(name, draw, taken) for _ in range(_HOPS + 1)]
    value = str(draw.randrange(10000, 99999))
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {names[hop + 1]} = VAR {names[hop]} " for hop in range(_HOPS)]
    hay = [NOISE] * count
    for place, link in zip(
        sorted(draw.sample(range(count), len(chain)), reverse=True), reversed(chain), strict=True
    ):
        hay.insert(place, link)
    before = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    )
    return Sample(
        id="",
        document=Document(
            example + before + "\n".join(hay), {SHOTS: [(0, len(example))]} if example else {}
        ),
        question="\nQuestion: Find all variables that are assigned the value "
        f"{value} in the text above.",
        answers=(" ".join(names),),
        prefix=" Answer: According to the chain(s) of variable assignment in the text above, "
        f"{_HOPS + 1} variables are assigned the value {value}, they are: ",
        extra={"expected": names},
    )
