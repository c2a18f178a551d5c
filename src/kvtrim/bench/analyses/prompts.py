"""The prompts of an analysis: samples of tasks, or texts of one's own."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from kvtrim.bench.analyses.base import Subject
from kvtrim.bench.eval.evaluate import Subject as Evaluated
from kvtrim.bench.eval.evaluate import distinct
from kvtrim.errors import UsageError
from kvtrim.prompts import frame
from kvtrim.prompts.document import Document
from kvtrim.tasks.base import Sample, Task

Rows = Callable[[str], list[dict[str, Any]]]


def of_tasks(
    model: Evaluated,
    tasks: Sequence[Task],
    rows: Rows,
    lengths: Sequence[int],
    limit: int,
    seed: int = 0,
) -> list[Subject]:
    """So many samples of each task, at each length that is asked for.

    Raises:
        UsageError: a sample that cannot be asked, a length beyond the window, or no sample at all.
    """
    found = []
    for length in lengths or [None]:
        encoder = model.encoder(length)
        for task in tasks:
            request = encoder.request(rows, limit, seed, task.chat)
            samples = distinct(islice(task.samples(request), limit))
            if not samples:
                raise UsageError(f"{task.name} has no samples; name another --task")
            for sample in samples:
                given = encoder.encode(task, sample)
                found.append(_check(Subject(f"{task.name}/{sample.id}", task, given)))
    return found


def of_texts(
    model: Evaluated,
    texts: Mapping[str, str],
    question: str | None,
    lengths: Sequence[int],
    chat: bool | None,
) -> list[Subject]:
    """Texts by name, each with the question, at each length; cut in the middle if longer.

    Raises:
        UsageError: as `of_tasks`.
    """
    between = frame(model.tokenizer, chat).between
    asked = "" if question is None else between + question
    found = []
    for length in lengths or [None]:
        encoder = model.encoder(length)
        for name, text in texts.items():
            task = _text_task(name, chat)
            sample = Sample(name, Document.of(text), asked, ())
            found.append(_check(Subject(name, task, encoder.encode(task, sample))))
    return found


def require_tokens(subjects: Sequence[Subject], least: int) -> None:
    """Refuse prompts in which there is nothing to see.

    Raises:
        UsageError: naming the shortest.
    """
    short = min(subjects, key=lambda one: one.tokens)
    if short.tokens < least:
        raise UsageError(
            f"{short.name} has {short.tokens} tokens; this analysis needs at least {least}: give "
            "a longer text or --length"
        )


def _check(subject: Subject) -> Subject:
    if subject.given.problem:
        raise UsageError(f"{subject.name}: {subject.given.problem}")
    return subject


def _text_task(name: str, chat: bool | None) -> Task:
    """A task that is nothing but one text, which no answer is right for."""

    def none(request: Any) -> Iterator[Sample]:
        yield from ()

    about = "a text of one's own"
    return Task(name, 1, about, "", "", 1, none, lambda answer, sample: 0.0, chat=chat)
