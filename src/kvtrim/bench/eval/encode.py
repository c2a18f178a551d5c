"""From a task's samples to token ids: context, question, the answer looked for, what was cut."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvtrim.prompts import (
    Frame,
    Prompt,
    encode_context,
    encode_ends,
    encode_question,
    encode_text,
    frame,
)
from kvtrim.prompts.spans import without
from kvtrim.records import InputLine
from kvtrim.tasks.base import Request, Sample, Task
from kvtrim.types import Spans

LENGTH = 4096
"""Tokens of prompts that are made to a length, where none was asked for and the model has them."""

_LEAST_CONTEXT = 8  # tokens; where a question leaves less, the sample cannot be asked
_SEAMS = 8  # tokens that a prompt may have more for being encoded in parts


@dataclass(frozen=True)
class Input:
    """One prompt as token ids, cut where a cache may be compressed before the rest is read."""

    sample: Sample
    context: list[int]
    question: list[int]  # all that follows: question, end of the message, beginning of the answer
    spans: Spans  # named parts of both together
    gold: list[int]  # the first answer
    frame: Frame
    truncated: bool = False  # the middle of the context was cut out
    problem: str = ""  # why it cannot be asked at all

    @property
    def ids(self) -> list[int]:
        """The whole prompt."""
        return self.context + self.question

    def read_first(self, aware: bool) -> tuple[list[int], Spans, list[int]]:
        """What is compressed, its named parts, and what is read after that."""
        if aware:
            return self.ids, self.spans, []
        return self.context, without(self.spans, len(self.context), len(self.ids)), self.question

    def line(self, task: str) -> InputLine:
        """What `inputs.jsonl` says of it."""
        own = self.sample
        return {
            "task": task,
            "sample": own.id,
            "group": dict(own.group),
            "answers": list(own.answers),
            "prefix": own.prefix,
            "extra": dict(own.extra),
            "context_tokens": len(self.context),
            "question_tokens": len(self.question),
            "truncated": self.truncated,
            "sha256": hashlib.sha256(" ".join(map(str, self.ids)).encode()).hexdigest(),
        }


@dataclass(frozen=True)
class Encoder:
    """Makes inputs of samples for one model."""

    tokenizer: Any
    window: int  # tokens that the model has positions for
    length: int | None = None  # asked for: how long prompts are made, and a bound for the others
    truncate_at: int | None = None  # tokens of a bare prompt above which it loses its middle

    def request(
        self,
        rows: Callable[[str], list[dict[str, Any]]],
        limit: int | None = None,
        seed: int = 0,
        chat: bool | None = None,
    ) -> Request:
        """What a task is asked for.

        Args:
            chat: the task's. Prompts are made so short that the template finds room beside them.
        """
        around = frame(self.tokenizer, chat)
        most = self.window - self.count(around.before) - self.count(around.after) - _SEAMS
        return Request(rows, self.count, min(self.length or LENGTH, most), limit, seed)

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(encode_text(self.tokenizer, text))

    def fits(self, task: Task, sample: Sample) -> bool:
        """Whether nothing of a sample has to be cut out."""
        given = self.encode(task, sample)
        return not given.truncated and not given.problem

    def encode(self, task: Task, sample: Sample) -> Input:
        """The token ids of a sample; the middle of its context is cut out if it is too long.

        Blanks at the end of the document are read with the question: before it they would be
        other tokens than they are inside a prompt that is encoded in one piece.
        """
        around = frame(self.tokenizer, task.chat)
        own = replace(around, between="", after=around.after + sample.prefix)
        document, blanks = sample.document.strip()
        asked = encode_question(self.tokenizer, own, blanks + sample.question)
        room = self._bound(sample.group) - task.max_new_tokens - len(asked)
        first = self.count(own.before)
        if room - first < _LEAST_CONTEXT:
            problem = self._problem(sample, first + len(asked), task.max_new_tokens)
            return Input(sample, [], asked.ids, {}, [], around, problem=problem)
        given = encode_context(self.tokenizer, own, document, room)
        if self.truncate_at is not None:
            bare = self.count(blanks + sample.question)
            whole = len(encode_context(self.tokenizer, own, document)) - first
            ends = _ends(self.truncate_at, self._special(), whole, bare)
            if ends is not None and min(ends) < 1:
                problem = _too_narrow(self.truncate_at, bare)
                return Input(sample, [], asked.ids, {}, [], around, problem=problem)
            if ends is not None and first + sum(ends) <= room:
                head, tail = ends
                given = encode_ends(self.tokenizer, own, document, first + head + tail, head)
        context, question, spans = _both(given.with_question(asked))
        gold = self._gold(task, sample, own)
        return Input(sample, context, question, spans, gold, around, given.cut)

    def _special(self) -> int:
        """Tokens that the tokenizer puts around every text, which LongBench's code counts."""
        return len(self.tokenizer("").input_ids)

    def _problem(self, sample: Sample, asked: int, answer: int) -> str:
        """Why so little is left for a context, and what would leave more."""
        bound, least = self._bound(sample.group), asked + answer + _LEAST_CONTEXT
        left = max(0, bound - asked - answer)
        remedy = f"use a model with a longer window (at least {least} tokens)"
        if bound < self.window:
            bounds, few = f"--length {bound}", least > self.window
            remedy = remedy if few else f"ask for --length {least} or more"
        else:
            bounds = f"the model's window of {bound}"
        return (
            f"the question has {asked} tokens, template included, and the answer may have "
            f"{answer}, which leaves {left} of {bounds} for the context; {remedy}"
        )

    def _bound(self, group: Mapping[str, Any]) -> int:
        """Tokens of prompt and answer; prompts that were made to a length are not cut to it."""
        if self.length is None or "length" in group:
            return self.window
        return min(self.window, self.length)

    def _gold(self, task: Task, sample: Sample, own: Frame) -> list[int]:
        """The first answer as the model would write it: after a blank, where none stands yet."""
        if not sample.answers or not sample.answers[0]:
            return []
        answer = sample.answers[0]
        before = own.after or sample.question or sample.document.text
        blank = "" if before[-1:].isspace() or answer[0].isspace() or not before else " "
        return encode_text(self.tokenizer, blank + answer)[: task.max_new_tokens]


def _ends(bound: int, special: int, context: int, question: int) -> tuple[int, int] | None:
    """How much of a context's beginning and end stays where LongBench's code cuts the prompt; None
    if that is short enough. The first and last half of so many tokens stay, whatever they are.
    """
    if special + context + question <= bound:
        return None
    half = bound // 2
    return half - special, half - question


def _too_narrow(bound: int, question: int) -> str:
    return (
        f"--truncate-at {bound} leaves half of it for the end of the prompt, and the question "
        f"alone has {question} tokens; ask for --truncate-at {2 * question + 2} or more"
    )


def _both(prompt: Prompt) -> tuple[list[int], list[int], Spans]:
    """Context and question, neither of them empty where the other has a token to spare."""
    context, question = prompt.context, prompt.question
    if not context:
        context, question = question[:1], question[1:]
    elif not question and len(context) > 1:
        context, question = context[:-1], context[-1:]
    return context, question, prompt.spans
