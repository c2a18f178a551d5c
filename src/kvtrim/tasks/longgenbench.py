"""LongGenBench-GSM8K: 35 problems in one prompt, answered one after the other in one long answer.

Paper:  Liu et al. 2024, https://arxiv.org/abs/2410.04199 (EMNLP 2024 Findings).
Code:   Dominic789654/LongGenBench@9845864: its fixed texts come with the data (`longgenbench`).
Prompt: the eight examples, all questions first, then all answers, so one example is two separate
        ranges of one shot; then problems 9, 10, ... of the next prompt-full of test rows.
Ours:   an answer belongs to the problem whose number it carries (the code pairs them by position,
        so that one missing answer shifts all later ones); a problem without an answer is wrong
        (the code divides by what was answered); numbers are compared as numbers (a gold with a
        comma can never match there, and minus signs are lost). The system message stands before
        the user's in the same text, so that models without one can be measured too.
        Upstream asks the first 700 test rows; here the first 700 that there are, and if they are
        fewer, as many prompts as they fill. `longgenbench-gsm8k-5` asks 5 problems a prompt.
"""

import re
from collections.abc import Iterator
from decimal import Decimal
from functools import partial
from typing import Any

from kvtrim.errors import UsageError
from kvtrim.prompts.document import SHOTS, Document
from kvtrim.tasks.base import Request, Sample, Task
from kvtrim.tasks.gsm8k import gold, solution_of
from kvtrim.tasks.numbers import final

PROMPTS = 20
_PART = re.compile(r"^(Question|Answer)_(\d+):", re.MULTILINE)
_NUMBERED = re.compile(  # "Answer_9" anywhere, "Answer 9" and "**Answer #9" where a line begins
    r"(?:^[^\w\n]*|\b(?=[a-z]+_))(Question|Answer)[ _#]*([0-9]+)", re.IGNORECASE | re.MULTILINE
)


def parse_answers(text: str) -> dict[int, str]:
    """What a long answer says to each number, from its first "Answer_<number>" on."""
    found: dict[int, str] = {}
    for part, end in _to_the_next(_NUMBERED, text):
        if part[1].lower() == "answer":
            found.setdefault(int(part[2]), text[part.end() : end])
    return found


def score(answer: str, sample: Sample) -> float:
    """The share of the problems that were answered rightly, of all that were asked."""
    said, golds = parse_answers(answer), sample.extra["finals"]
    right = sum(
        final(said.get(number, "")) == Decimal(wanted)
        for number, wanted in enumerate(golds, start=sample.extra["first"])
    )
    return right / len(golds)


def examples(texts: dict[str, Any]) -> Document:
    """What stands before the problems; each shot is its question and its answer.

    Raises:
        UsageError: a question of the examples has no answer, or the other way round.
    """
    before = f"{texts['system']}\n\n{texts['user_head']}"
    text = before + texts["examples"]
    units: dict[str, dict[str, tuple[int, int]]] = {"Question": {}, "Answer": {}}
    for part, end in _to_the_next(_PART, texts["examples"]):
        units[part[1]][part[2]] = (len(before) + part.start(), len(before) + end)
    if not units["Answer"] or units["Question"].keys() != units["Answer"].keys():
        raise UsageError(
            "the examples of 'longgenbench' are not numbered pairs of Question_N: and Answer_N:; "
            "take the file gsm8k_prompt.txt from the benchmark's repository"
        )
    return Document(
        text, {SHOTS: [[at, units["Answer"][n]] for n, at in units["Question"].items()]}
    )


def _to_the_next(heading: re.Pattern[str], text: str) -> Iterator[tuple[re.Match[str], int]]:
    """Every heading of a text, and where the next one or the text's end is."""
    found = list(heading.finditer(text))
    ends = [part.start() for part in found[1:]] + [len(text)]
    return zip(found, ends, strict=False)


def _samples(request: Request, problems: int) -> Iterator[Sample]:
    texts = request.rows("longgenbench")[0]
    document, first = examples(texts), texts["first_question_number"]
    rows = request.rows("gsm8k/test")
    prompts = min(PROMPTS, len(rows) // problems)
    for number in range(prompts if request.limit is None else min(prompts, request.limit)):
        asked = rows[number * problems : (number + 1) * problems]
        items = [
            texts["question_item"].format(i=at, q=row["question"])
            for at, row in enumerate(asked, start=first)
        ]
        wanted = [f"Answer_{at}:\n{solution_of(row)}" for at, row in enumerate(asked, start=first)]
        yield Sample(
            id=str(number),
            document=document,
            question=texts["user_middle"] + "".join(items) + texts["user_tail"],
            answers=("\n\n".join(wanted),),
            extra={
                "first": first,
                "finals": [gold(row) for row in asked],
                "rows": [row["id"] for row in asked],
            },
        )


def _task(name: str, problems: int, max_new_tokens: int) -> Task:
    return Task(
        name=name,
        version=1,
        about=f"{problems} problems of GSM8K in one prompt, all answered at once; the first "
        f"{PROMPTS * problems} test rows at hand.",
        source="LongGenBench@9845864",
        metric="share of problems right",
        max_new_tokens=max_new_tokens,
        samples=partial(_samples, problems=problems),
        score=score,
        data=("longgenbench", "gsm8k/test"),
    )


TASKS = (
    _task("longgenbench-gsm8k", 35, 4096),
    _task("longgenbench-gsm8k-5", 5, 768),
)
