"""Seconds and bytes of prefill and decoding, each method beside plain transformers in one run.

Round 0 of every shape (batch, prompt length, candidate) is never timed: it measures memory, which
slows a pass down, and warms the shape up. The rounds that count run all candidates in turn, there
and back, so that a drifting machine slows them alike. Each figure goes to a journal at once; rows,
medians and ratios are made from it by `kvtrim.report.speed`.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch

from kvtrim.bench import failures
from kvtrim.bench.candidates import Candidate, Feed, Subject
from kvtrim.bench.provenance import peak_memory
from kvtrim.errors import UsageError
from kvtrim.hf.generate import synchronize
from kvtrim.hf.models.architectures import window
from kvtrim.records import (
    FAILED,
    OK,
    OOM,
    REFUSED,
    SpeedFigures,
    SpeedKey,
    SpeedLine,
    SpeedOutcome,
    StepTimes,
)
from kvtrim.records.journal import Journal
from kvtrim.types import Int, Tensor

MEMORY = 0
"""The round that measures memory."""

_WARM_UP = 512  # tokens of the very first prompts, which are not counted
_MEMORY_STEPS = 4  # new tokens while memory is measured: it grows by an entry with each


@dataclass(frozen=True)
class Plan:
    """What is measured, apart from the methods."""

    lengths: tuple[int, ...]  # tokens of the (random) prompts
    batches: tuple[int, ...] = (1,)  # prompts at once
    new_tokens: int = 32  # decoding steps after each prompt's first token
    repeats: int = 3  # counted rounds
    prefill_chunk: int | None = None  # tokens read in one pass at most
    capture: bool = True  # capture decoding steps (CUDA graphs) where that can be done

    def require_fits(self, model: Any, trained: bool = True) -> None:
        """Refuse prompts that the model has no positions for.

        Raises:
            UsageError: naming the window. Without training the new tokens do not count.
        """
        require_window(model, self.lengths, self.new_tokens, trained)


def require_window(model: Any, lengths: Sequence[int], new_tokens: int, trained: bool) -> None:
    """Refuse prompts, and new tokens of a trained model, that exceed its window. UsageError."""
    most = window(model)
    if max(lengths) + new_tokens * trained > most:
        new = f" + {new_tokens}" if trained else ""
        raise UsageError(
            f"prompts of {max(lengths)}{new} tokens exceed the window, {most}; give a smaller "
            "--length, or a model with a longer window"
        )


@dataclass(frozen=True)
class Turn:
    """One candidate's turn in one round."""

    round: int
    batch: int
    length: int
    candidate: Candidate

    @property
    def row(self) -> SpeedKey:
        """What tells rows of the table apart."""
        own = self.candidate
        return {
            "batch": self.batch, "length": self.length, "method": own.label, "keep": own.keep,
        }  # fmt: skip

    def label(self, rounds: int) -> str:
        """For the progress bar."""
        name = self.candidate.said
        batch = f" x {self.batch}" if self.batch > 1 else ""
        when = f"round {self.round} of {rounds}" if self.round else "memory"
        return f"{name}, {self.length} tokens{batch}, {when}"


def turns(plan: Plan, chosen: Sequence[Candidate]) -> Iterator[Turn]:
    """Every turn, in order; every other round runs backwards."""
    for number in range(plan.repeats + 1):
        for batch in plan.batches:
            for length in plan.lengths:
                for candidate in reversed(chosen) if number % 2 else chosen:
                    yield Turn(number, batch, length, candidate)


def measure(
    model: Any,
    plan: Plan,
    chosen: Sequence[Candidate],
    journal: Journal,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Run every turn that the journal does not hold yet, and write down what it gave.

    A row that cannot be measured (too little memory, a budget out of the method's reach, a peer
    that fails) is written down with its reason, is not tried again, and the run goes on.
    """
    left = [turn for turn in turns(plan, chosen) if not _is_settled(journal, turn)]
    if not left:
        return
    progress("warming up")
    for candidate in chosen:
        _attempt(_warm_up, model, plan, Turn(1, 1, min(_WARM_UP, *plan.lengths), candidate))
    with _quick_collections():
        for turn in left:
            progress(turn.label(plan.repeats))
            if not _is_settled(journal, turn):
                how = _time if turn.round != MEMORY else _memory
                found = _attempt(how, model, plan, turn)
                line: SpeedLine = {**turn.row, "round": turn.round, **found}
                journal.add(line)


@contextmanager
def _quick_collections() -> Iterator[None]:
    """Spare Python's garbage collector what was there before, which takes it half a second."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _is_settled(journal: Journal, turn: Turn) -> bool:
    """Whether this turn was taken, or its row has failed."""
    failed = any(journal.holds({**turn.row, "outcome": why}) for why in (OOM, REFUSED, FAILED))
    return failed or journal.holds({**turn.row, "round": turn.round})


def _attempt(
    how: Callable[[Any, Plan, Turn], SpeedFigures], model: Any, plan: Plan, turn: Turn
) -> SpeedOutcome:
    """What a measurement gave, or why it gave nothing."""
    try:
        return {"outcome": OK, **how(model, plan, turn)}
    except Exception as error:
        outcome = failures.outcome(error) or (FAILED if turn.candidate.peer else None)
        if outcome is None:
            raise
        reason = failures.reason(error, outcome)
    gc.collect()  # only here, since the traceback held the tensors
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    return {"outcome": outcome, "reason": reason}


def _warm_up(model: Any, plan: Plan, turn: Turn) -> SpeedFigures:
    """A short prompt and two tokens."""
    ids = prompt(model, turn.batch, turn.length)
    with turn.candidate.open(model, turn.length, None) as subject, torch.no_grad():
        token, _ = step(model, subject.feed, ids)
        step(model, subject.feed, token)
    return {}


def _memory(model: Any, plan: Plan, turn: Turn) -> SpeedFigures:
    """Peak bytes of reading the prompt and of decoding, above the loaded model."""
    ids, chunk = prompt(model, turn.batch, turn.length), plan.prefill_chunk
    opened = turn.candidate.open(model, turn.length, chunk, plan.capture)
    with opened as subject, torch.no_grad():
        with peak_memory(model.device) as reading:
            token, _ = step(model, subject.feed, ids, chunk)
        count = min(_MEMORY_STEPS, plan.new_tokens)
        with peak_memory(model.device, reading.base) as decoding, subject.steps(count) as steps:
            for _ in range(count):
                token, _ = step(model, steps[0], token)
    return {"peak_bytes": reading.bytes, "decode_peak_bytes": decoding.bytes}


def _time(model: Any, plan: Plan, turn: Turn) -> SpeedFigures:
    """Seconds of one prompt and its decoding steps; bytes and entries held after the prompt."""
    ids, chunk = prompt(model, turn.batch, turn.length), plan.prefill_chunk
    gc.collect()
    if model.device.type == "cuda":  # so that all begin alike: making a graph does the same
        torch.cuda.empty_cache()
    opened = turn.candidate.open(model, turn.length, chunk, plan.capture)
    with opened as subject, torch.no_grad():
        token, first = step(model, subject.feed, ids, chunk)
        held = subject.figures()
        decoding = time_steps(model, subject, token, plan.new_tokens)
    whole = first + decoding["capture_s"] + plan.new_tokens * decoding["token_s"]
    return {"ttft_s": first, "end_to_end_s": whole, **decoding, **held}


def time_steps(model: Any, subject: Subject, token: Int[Tensor, "B 1"], count: int) -> StepTimes:
    """Seconds of so many decoding steps behind what a subject has read."""
    steps, start = [], perf_counter()
    with subject.steps(count) as (feed, captured):
        synchronize(model.device)
        before = perf_counter() - start
        for _ in range(count):
            token, seconds = step(model, feed, token)
            steps.append(seconds)
    return {
        "token_s": sum(steps) / len(steps),
        "median_step_s": median(steps),
        "captured": captured,
        "capture_s": before,
    }


def step(
    model: Any, feed: Feed, ids: Int[Tensor, "B n"], chunk: int | None = None
) -> tuple[Tensor, float]:
    """The next token of every row, and the seconds until it is there."""
    synchronize(model.device)
    start = perf_counter()
    first, *others = ids.split(chunk or ids.shape[1], dim=1)
    logits = feed(first)
    for part in others:
        logits = feed(part)
    token = logits[:, -1].argmax(dim=-1, keepdim=True)
    synchronize(model.device)
    return token, perf_counter() - start


def prompt(model: Any, batch: int, length: int) -> Int[Tensor, "B n"]:
    """Random tokens, the same for every candidate and round."""
    size = model.config.get_text_config(decoder=True).vocab_size
    draw = torch.Generator().manual_seed(length)
    return torch.randint(size // 10, size, (batch, length), generator=draw).to(model.device)
