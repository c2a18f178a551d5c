"""LongBench: the 16 English tasks, six categories, with the official prompts and scorers.

Paper: Bai et al. 2023, https://arxiv.org/abs/2308.14508.
Code:  THUDM/LongBench (MIT), config (prompts and lengths, unchanged in `longbench.json`), pred.py,
       eval.py (072a5a7), metrics.py (f6227eb).
Ours:  the prompt is cut behind the context, the instruction in front of it being part of the
       document, and for code behind everything that is to be completed. So the question of the
       code tasks is "Next line of code:" alone, and it is the whole question-and-passage of a
       few-shot task. A prompt that is too long loses the middle of its document; the official code
       cuts the middle of the whole prompt. Scorers: see `tasks.scorers`.

The few-shot and code tasks go without the chat template, as in the official code; SAMSum's answer
ends at a new line, which cannot come first (nor, ours, can another token with one in it), and only
the first line counts in the few-shot tasks.
"""

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from importlib.resources import files
from itertools import islice

from kvtrim.errors import UsageError
from kvtrim.prompts.document import Document
from kvtrim.tasks import scorers
from kvtrim.tasks.base import Request, Sample, Task

SOURCE = "arXiv 2308.14508, THUDM/LongBench"
KINDS = {
    "single-doc QA": ("narrativeqa", "qasper", "multifieldqa_en"),
    "multi-doc QA": ("hotpotqa", "2wikimqa", "musique"),
    "summarization": ("gov_report", "qmsum", "multi_news"),
    "few-shot": ("trec", "triviaqa", "samsum"),
    "synthetic": ("passage_count", "passage_retrieval_en"),
    "code": ("lcc", "repobench-p"),
}
_ABOUT = {
    "narrativeqa": "Questions about a novel or a film script.",
    "qasper": "Questions about a scientific article.",
    "multifieldqa_en": "Questions about articles of many fields.",
    "hotpotqa": "Questions that need two of several Wikipedia passages.",
    "2wikimqa": "Questions that need up to five of several Wikipedia passages.",
    "musique": "Questions that need up to four of several Wikipedia passages.",
    "gov_report": "Summarise a report by a government agency.",
    "qmsum": "Answer a query about a meeting by a summary.",
    "multi_news": "Summarise several news articles on one event.",
    "trec": "Classify a question after examples, 50 classes.",
    "triviaqa": "Answer a question on a passage after examples.",
    "samsum": "Summarise a dialogue after examples.",
    "passage_count": "Count the different paragraphs among repeated ones.",
    "passage_retrieval_en": "Find the paragraph of which a summary is given, among thirty.",
    "lcc": "Write the next line of a source file.",
    "repobench-p": "Write the next line of a source file, given snippets of other files.",
}
_SHOT = {"trec": "Question: ", "triviaqa": "Passage:\n", "samsum": "Dialogue: "}
_PASSAGE = re.compile(r"^(?:Passage|Paragraph) \d+:", re.MULTILINE)
_CONTEXT, _INPUT = "{context}", "{input}"


def _parts(task: str, context: str, start: int) -> dict[str, list[tuple[int, int]]]:
    """Named parts of a context that begins at `start`: its shots, or its passages."""
    shot = _SHOT.get(task)
    name, begins = "passages", _PASSAGE
    if shot:
        name, begins = "shots", re.compile(f"^{re.escape(shot)}", re.MULTILINE)
    found = [start + match.start() for match in begins.finditer(context)]
    ends = [*found[1:], start + len(context)]
    return {name: list(zip(found, ends, strict=True))} if found else {}


def _document(task: str, before: str, context: str, after: str) -> Document:
    return Document(before + context + after, _parts(task, context, len(before)))


def _samples(task: str, template: str, request: Request) -> Iterator[Sample]:
    before, _, after = template.partition(_CONTEXT)
    within = _INPUT if after.startswith(_INPUT) else ""  # repobench-p: more code
    after = after.removeprefix(within)
    for row in islice(request.rows(f"longbench/{task}"), request.limit):
        if task == "trec" and not row["all_classes"]:
            raise UsageError(
                f"longbench/trec: row {row['id']} has no all_classes, which its score needs; "
                "take the row from LongBench's own file"
            )
        yield Sample(
            id=str(row["id"]),
            document=_document(
                task, before, row["context"], within.replace(_INPUT, row["question"])
            ),
            question=after.replace(_INPUT, row["question"]),
            answers=tuple(row["answers"]),
            extra={"all_classes": row["all_classes"]} if row["all_classes"] else {},
        )


def _f1(answer: str, sample: Sample) -> float:
    return scorers.token_f1(answer, sample.answers)


def _rouge(answer: str, sample: Sample) -> float:
    return scorers.rouge_l(answer, sample.answers)


def _code(answer: str, sample: Sample) -> float:
    return scorers.code_similarity(answer, sample.answers)


def _count(answer: str, sample: Sample) -> float:
    return scorers.count(answer, sample.answers)


def _retrieval(answer: str, sample: Sample) -> float:
    return scorers.retrieval(answer, sample.answers)


def _classes(answer: str, sample: Sample) -> float:
    line = scorers.first_line(answer)
    return scorers.classification(line, sample.answers, sample.extra["all_classes"])


def _first_line(score: Callable[[str, Sample], float], answer: str, sample: Sample) -> float:
    return score(scorers.first_line(answer), sample)


_SCORES: dict[str, tuple[str, Callable[[str, Sample], float]]] = {
    "single-doc QA": ("F1", _f1),
    "multi-doc QA": ("F1", _f1),
    "summarization": ("ROUGE-L", _rouge),
    "trec": ("accuracy", _classes),
    "triviaqa": ("F1", partial(_first_line, _f1)),
    "samsum": ("ROUGE-L", partial(_first_line, _rouge)),
    "passage_count": ("accuracy", _count),
    "passage_retrieval_en": ("accuracy", _retrieval),
    "code": ("edit similarity", _code),
}


def name_of(task: str) -> str:
    """LongBench's name of a task as kvtrim's."""
    return f"longbench-{task.replace('_', '-')}"


def _tasks() -> Iterator[Task]:
    config = json.loads(files("kvtrim.tasks").joinpath("longbench.json").read_text("utf-8"))
    for kind, tasks in KINDS.items():
        for task in tasks:
            metric, score = _SCORES[task] if task in _SCORES else _SCORES[kind]
            yield Task(
                name=name_of(task),
                version=1,
                about=_ABOUT[task],
                source=SOURCE,
                metric=metric,
                max_new_tokens=config[task]["max_new_tokens"],
                min_new_tokens=1,
                samples=partial(_samples, task, config[task]["prompt"]),
                score=score,
                chat=False if kind in ("few-shot", "code") else None,
                stop=("\n",) if task == "samsum" else (),
                data=(f"longbench/{task}",),
            )


TASKS: tuple[Task, ...] = tuple(_tasks())
CATEGORIES = {kind: tuple(map(name_of, tasks)) for kind, tasks in KINDS.items()}
"""The six categories that LongBench averages over, and the names of their tasks."""
