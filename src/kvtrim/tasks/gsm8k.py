"""GSM8K: grade-school arithmetic, worked step by step behind 0 to 8 or 50 worked examples.

Paper:  Cobbe et al. 2021, https://arxiv.org/abs/2110.14168; the eight examples: Wei et al. 2022,
        https://arxiv.org/abs/2201.11903, table 20.
Prompt: EleutherAI/lm-evaluation-harness 0.4.13, lm_eval/tasks/gsm8k/gsm8k-cot.yaml: examples,
        wording, stops, no chat template. k examples are the first k.
Score:  the number behind the first "The answer is", else the last one, equal to the gold as a
        number. lm-eval gives these two as strict-match and flexible-extract, each alone; its
        strict pattern wants one more character and reads "The answer is 18" without a period
        as 1, and it compares text, so that 18.00 is not 18.
Ours:   0 examples: a document must hold something, so one sentence asks for the same form of
        answer. 50 examples (KVFundaBench names no source): the first 50 rows of the training
        split whose example is at most 400 characters, which makes over 4,000 tokens; calculator
        marks are left out, and "#### N" becomes "The answer is N.".
        The likelihood of the gold answer is that of its worked solution in the same form.
"""

import re
from collections.abc import Iterator
from decimal import Decimal
from functools import partial
from itertools import islice
from typing import Any

from kvtrim.errors import UsageError
from kvtrim.tasks.base import Request, Sample, Task
from kvtrim.tasks.numbers import final, numbers
from kvtrim.tasks.shots import document

INSTRUCTION = (
    'Solve the problem step by step and end with "The answer is N.", N being a number.\n\n'
)
MANY, LONGEST = 50, 400
STOP = ("Q:", "</s>", "<|im_end|>")
_MARK = re.compile(r"<<.*?>>")


def solution_of(row: dict[str, Any]) -> str:
    """A row's solution in the form of the examples: no marks, "The answer is N." at its end."""
    steps, _, gold = row["answer"].rpartition("####")
    return f"{_MARK.sub('', steps).strip()}\nThe answer is {gold.strip()}."


def gold(row: dict[str, Any]) -> str:
    """A row's number, without thousands separators."""
    return str(numbers(row["answer"].rpartition("####")[2])[-1])


def score(answer: str, sample: Sample) -> float:
    """1 if the answer's number is the gold one."""
    return float(final(answer) == Decimal(sample.extra["final"]))


def _shot(question: str, answer: str) -> str:
    return f"Q: {question}\nA: {answer}"


def _chain_of_thought(request: Request, count: int) -> list[str]:
    """The first examples of Wei et al."""
    rows = request.rows("gsm8k/cot8")[:count] if count else []
    return [_shot(row["question"], row["answer"]) for row in rows]


def _many(request: Request) -> list[str]:
    """The first training rows that are short enough."""
    made = (_shot(row["question"], solution_of(row)) for row in request.rows("gsm8k/train"))
    shots = list(islice((shot for shot in made if len(shot) <= LONGEST), MANY))
    if len(shots) < MANY:
        raise UsageError(
            f"gsm8k-{MANY} needs {MANY} training rows of at most {LONGEST} characters, "
            f"'gsm8k/train' has {len(shots)}; give it the first 1,000 rows of the training split"
        )
    return shots


def _samples(request: Request, count: int) -> Iterator[Sample]:
    shots = _many(request) if count == MANY else _chain_of_thought(request, count)
    examples = document(shots, "" if shots else INSTRUCTION)
    for row in request.rows("gsm8k/test")[: request.limit]:
        yield Sample(
            id=str(row["id"]),
            document=examples,
            question=f"Q: {row['question']}\nA:",
            answers=(" " + solution_of(row),),
            extra={"final": gold(row)},
        )


def _task(count: int) -> Task:
    examples = {0: ["gsm8k/test"], MANY: ["gsm8k/test", "gsm8k/train"]}
    rule = f"the first {count} of the eight of Wei et al. 2022" if count else ""
    many = f"the first {MANY} training rows whose example has at most {LONGEST} characters"
    return Task(
        name=f"gsm8k-{count}",
        version=1,
        about=f"Arithmetic in words, worked step by step, {count or 'no'} worked "
        f"example{'' if count == 1 else 's'} before it.",
        source="lm-evaluation-harness 0.4.13, gsm8k_cot",
        metric="exact match",
        max_new_tokens=256,
        samples=partial(_samples, count=count),
        score=score,
        chat=False,
        stop=STOP,
        shots=many if count == MANY else rule,
        data=tuple(examples.get(count, ["gsm8k/test", "gsm8k/cot8"])),
    )


TASKS = tuple(map(_task, (0, 1, 2, 4, 6, 8, MANY)))
