"""Multiple choice, answered with one letter: MMLU (57 subjects) and CommonsenseQA.

Papers: Hendrycks et al. 2021, https://arxiv.org/abs/2009.03300; Talmor et al. 2019,
        https://arxiv.org/abs/1811.00937.
Prompt: EleutherAI/lm-evaluation-harness 0.4.13, lm_eval/tasks/mmlu/generative (subject's first
        five `dev` rows, no chat template) and tasks/commonsense_qa. That task compares
        likelihoods; here its prompt is gone on with, as MMLU's is.
Score:  the first line's letter, read by `tasks.letters`. lm-eval compares the whole first line,
        so that "B. an apple" is wrong there.
Ours:   CommonsenseQA's four examples are the first four training rows (KVFundaBench names none).
        Without examples a document must still hold something: MMLU's own heading, and one like it
        for CommonsenseQA. A limit takes MMLU's rows from all subjects in turn.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import zip_longest
from typing import Any

from kvtrim.tasks.base import Request, Sample, Task
from kvtrim.tasks.letters import letter
from kvtrim.tasks.shots import document

HEADING = "The following are multiple choice questions (with answers) about {about}.\n\n"
STOP = ("</s>", "\n")


def score(answer: str, sample: Sample) -> float:
    """1 if the first line chooses the right letter."""
    line = answer.split("\n", 1)[0]
    return float(letter(line, sample.extra["choices"]) == sample.extra["letter"])


def _letters(row: dict[str, Any]) -> Iterable[tuple[str, str]]:
    return zip("ABCDEFGHIJ", row["choices"], strict=False)


def _ask(row: dict[str, Any], before: str = "") -> str:
    lines = [before + row["question"].strip(), *(f"{a}. {text}" for a, text in _letters(row))]
    return "\n".join([*lines, "Answer:"])


def _gold(row: dict[str, Any]) -> str:
    return "ABCDEFGHIJ"[row["answer"]]


def _sample(row: dict[str, Any], question: str, **rest: Any) -> Sample:
    return Sample(
        id=str(row["id"]),
        question=question,
        answers=(f" {_gold(row)}",),
        extra={"letter": _gold(row), "choices": len(row["choices"])},
        **rest,
    )


def _by_subject(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found = defaultdict(list)
    for row in rows:
        found[row["subject"]].append(row)
    return found


def _mmlu(request: Request, count: int) -> Iterator[Sample]:
    examples = {}
    shots = _by_subject(request.rows("mmlu/dev") if count else [])
    asked = _by_subject(request.rows("mmlu/test"))
    for subject in asked:
        texts = [f"{_ask(row)} {_gold(row)}" for row in shots[subject][:count]]
        examples[subject] = document(texts, HEADING.format(about=subject.replace("_", " ")))
    rows = [row for rank in zip_longest(*asked.values()) for row in rank if row is not None]
    for row in rows[: request.limit]:
        subject = row["subject"]
        yield _sample(row, _ask(row), document=examples[subject], group={"subject": subject})


def _csqa(request: Request, count: int) -> Iterator[Sample]:
    rows = request.rows("csqa/train")[:count] if count else []
    shots = [f"{_ask(row, 'Question: ')} {_gold(row)}" for row in rows]
    examples = document(shots, "" if shots else HEADING.format(about="common sense"))
    for row in request.rows("csqa/dev")[: request.limit]:
        yield _sample(row, _ask(row, "Question: "), document=examples)


def _task(name: str, count: int, about: str, samples: Any, source: str, *data: str) -> Task:
    rule = {"mmlu": "the first {} dev rows of the subject", "csqa": "the first {} training rows"}
    return Task(
        name=f"{name}-{count}",
        version=1,
        about=f"{about}; {count or 'no'} examples before it.",
        source=f"lm-evaluation-harness 0.4.13, {source}",
        metric="accuracy",
        max_new_tokens=32,
        samples=partial(samples, count=count),
        score=score,
        chat=False,
        stop=STOP,
        shots=rule[name].format(count) if count else "",
        data=data,
    )


_FOUR = "The letter of the right one of four answers, 57 subjects"
_FIVE = "The letter of the right one of five answers, common sense"

TASKS = (
    _task("mmlu", 0, _FOUR, _mmlu, "mmlu_generative", "mmlu/test"),
    _task("mmlu", 5, _FOUR, _mmlu, "mmlu_generative", "mmlu/test", "mmlu/dev"),
    _task("csqa", 0, _FIVE, _csqa, "commonsense_qa", "csqa/dev"),
    _task("csqa", 4, _FIVE, _csqa, "commonsense_qa", "csqa/dev", "csqa/train"),
)
