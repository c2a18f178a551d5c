"""Tasks of the tests' own: words in a row, one of them asked for."""

import random

from kvtrim.prompts.document import Document
from kvtrim.tasks.base import Sample, Task

WORDS = "ash birch cedar elm fir hazel larch maple oak pine rowan willow".split()


def samples(request, prefix="", shortest=8, longest=14):
    for number in range(request.limit or 4):
        draw = random.Random(f"{request.seed} {number}")
        words = [draw.choice(WORDS) for _ in range(draw.randrange(shortest, longest))]
        asked = draw.randrange(len(words))
        text = "".join(f"{place} {word}\n" for place, word in enumerate(words))
        yield Sample(
            id=f"w{number}",
            document=Document(text),
            question=f"\nWhich word is at {asked}?",
            answers=(words[asked], words[asked].upper()),
            prefix=prefix,
            group={"half": "first" if asked < len(words) / 2 else "second"},
            extra={"asked": asked},
        )


def score(answer, sample):
    return float(any(word in answer for word in sample.answers))


def task(name="words", **changed):
    return Task(
        **{
            "name": name,
            "version": 1,
            "about": "which word is at a place",
            "source": "the tests",
            "metric": "found",
            "max_new_tokens": 6,
            "samples": samples,
            "score": score,
        }
        | changed
    )


WORDS_TASK = task()
PREFIXED = task(
    "prefixed", samples=lambda request: samples(request, prefix="The word is"), max_new_tokens=4
)
LONG = task("long", samples=lambda request: samples(request, shortest=80, longest=90))
CODE = task("code", runs_code=True, chat=False)
