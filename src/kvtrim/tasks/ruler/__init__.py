"""RULER: thirteen tasks made from a seed at any length.

Paper: Hsieh et al. 2024, https://arxiv.org/abs/2404.06654.
Code:  NVIDIA/RULER (Apache-2.0), scripts/synthetic.yaml (the thirteen settings), scripts/data/
       synthetic (prompts, answer prefixes, new tokens), scripts/eval/synthetic (scores).
Ours:  every sample has its own random numbers, from (seed, task, number), and is as long as fits:
       the official code finds one number of units for all samples of a task. See the module of
       each kind for the rest.

`Request.length` counts instruction, text, question, answer prefix and room for the answer, not the
chat template. The answer prefix is given to the model, and is no part of the answer.
"""

from collections.abc import Callable, Iterator
from functools import partial

from kvtrim.tasks import scorers
from kvtrim.tasks.base import Request, Sample, Task
from kvtrim.tasks.length import MADE, largest
from kvtrim.tasks.ruler import chains, needles, questions, words
from kvtrim.tasks.ruler.needles import Needles
from kvtrim.tasks.ruler.words import Draw

SOURCE = "arXiv 2404.06654, NVIDIA/RULER scripts/data/synthetic"
_COMMON, _FREQUENT = 120, 50  # new tokens of cwe and fwe
NEEDLES: dict[str, tuple[str, Needles]] = {
    "single-1": ("A number for a word, in repeated noise.", Needles("noise")),
    "single-2": ("A number for a word, in essays.", Needles("essays")),
    "single-3": ("A UUID for a word, in essays.", Needles("essays", value="uuids")),
    "multikey-1": ("A number for one of four words, in essays.", Needles("essays", keys=4)),
    "multikey-2": ("A number for a word, among other such pairs.", Needles("needles")),
    "multikey-3": (
        "A UUID for a UUID, among other such pairs.",
        Needles("needles", key="uuids", value="uuids"),
    ),
    "multivalue": ("All four numbers for a word, in essays.", Needles("essays", values=4)),
    "multiquery": (
        "The numbers for four words, in essays.",
        Needles("essays", keys=4, asked=4),
    ),
}
Make = Callable[[Request, str], Sample]


def _needles(task: Needles, request: Request, seed: str) -> Sample:
    least = 50 if task.hay == "essays" else max(2, task.keys * task.values)

    def make(count: int) -> Sample:
        return needles.sample(task, request, Draw(seed), count)

    return largest(make, request, needles.ANSWER, least)


def _common(request: Request, seed: str) -> Sample:
    def make(count: int) -> Sample:
        return words.common(request, Draw(seed), count)

    return largest(make, request, _COMMON, 10)


def _frequent(request: Request, seed: str) -> Sample:
    def make(count: int) -> Sample:
        return words.frequent(request, _FREQUENT, Draw(seed), count)

    return largest(make, request, _FREQUENT, words.LEAST_CODED)


def _number(request: Request, place: int, sample: Sample) -> Sample:
    return Sample(
        id=f"{request.length}/{place}",
        document=sample.document,
        question=sample.question,
        answers=sample.answers,
        prefix=sample.prefix,
        group={"length": request.length},
        extra=sample.extra,
    )


def _make(name: str, make: Make, request: Request) -> Iterator[Sample]:
    for place in range(MADE if request.limit is None else request.limit):
        yield _number(request, place, make(request, f"{request.seed} {name} {place}"))


def _ask(name: str, data: str, request: Request) -> Iterator[Sample]:
    known = questions.library(request, data)
    limit = MADE if request.limit is None else request.limit
    for place, row in enumerate(known.asked[:limit]):

        def make(count: int, row: dict = row, place: int = place) -> Sample:
            draw = Draw(f"{request.seed} {name} {place}")
            return questions.sample(known, row, draw, count)

        least = len(set(row["documents"]))
        found = largest(make, request, questions.ANSWER, least, max(least, len(known.pages)))
        yield _number(request, place, found)


def _all(answer: str, sample: Sample) -> float:
    return scorers.string_match_all(answer, sample.extra["expected"])


def _any(answer: str, sample: Sample) -> float:
    return scorers.string_match_part(answer, sample.answers)


def _task(name: str, about: str, new: int, make: Make, data: tuple[str, ...] = ()) -> Task:
    return Task(
        name=f"ruler-{name}",
        version=1,
        about=about,
        source=SOURCE,
        metric="strings found",
        max_new_tokens=new,
        samples=partial(_make, name, make),
        score=_all,
        data=data,
    )


def _question_task(name: str, about: str, data: str) -> Task:
    return Task(
        name=f"ruler-{name}",
        version=1,
        about=about,
        source=SOURCE,
        metric="any string found",
        max_new_tokens=questions.ANSWER,
        samples=partial(_ask, name, data),
        score=_any,
        data=(data,),
    )


OFFLINE: tuple[Task, ...] = (
    *(
        _task(
            f"niah-{name}",
            about,
            needles.ANSWER,
            partial(_needles, task),
            ("essays",) if task.hay == "essays" else (),
        )
        for name, (about, task) in NEEDLES.items()
    ),
    _task("vt", "All variables of a chain of assignments.", chains.ANSWER, chains.sample),
    _task("cwe", "The ten most common words of a list.", _COMMON, _common),
    _task("fwe", "The three most frequent words of a coded text.", _FREQUENT, _frequent),
)
TASKS: tuple[Task, ...] = (
    *OFFLINE,
    _question_task("qa-1", "A question of SQuAD, its paragraph among others.", "squad"),
    _question_task("qa-2", "A question of HotpotQA, its paragraphs among others.", "hotpotqa"),
)
