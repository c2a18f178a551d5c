"""One prompt under every method: read once where that gives the same, else once for each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch

from kvtrim.bench.candidates import Candidate, read_prompt
from kvtrim.bench.eval.encode import Input
from kvtrim.bench.failures import Failure, attempt
from kvtrim.hf.cache import Cache
from kvtrim.hf.generate import mean_entries, synchronize
from kvtrim.hf.replay import Recording, record
from kvtrim.prompts import repeat_words
from kvtrim.records import Times
from kvtrim.types import Float, Tensor


@dataclass(frozen=True)
class Ready:
    """A cache after the prompt, or after the context where the question comes later."""

    cell: Candidate
    cache: Cache
    logits: Float[Tensor, " V"]  # of the token after what was read
    held: dict[str, Any]
    times: Times


def replayable(cell: Candidate) -> bool:
    """Whether a method leaves the pass over the prompt as it is."""
    method = cell.settled
    return not method.propagation.narrows and not method.schedule.chunks


def _reads_hidden(cell: Candidate) -> bool:
    found = attempt(lambda: cell.settled.policy.reads_hidden)
    return found is True


class Prefill:
    """Makes the caches of one prompt. The model must be attached.

    Args:
        once: read the prompt once for all methods that leave that pass as it is.
        chunk: tokens of a pass, for methods that cut after each of them.
        shared: what a policy observes in the prompt is kept for its other budgets.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        given: Input,
        aware: bool,
        once: bool,
        chunk: int | None = None,
        shared: bool = True,
    ):
        self._model = model
        ids, self._spans, _ = given.read_first(aware)
        self._ids = torch.tensor([ids], device=model.device)
        self._words = repeat_words(tokenizer, given.frame)
        self._once, self._recorded_s, self._hidden = once, 0.0, False
        self._chunk, self._shared = chunk, shared
        self._recording: Recording | None = None

    def ready(self, cells: Sequence[Candidate]) -> list[Ready | Failure]:
        """One for each cell, in order."""
        return [*self.each(cells)]

    def each(self, cells: Sequence[Candidate]) -> Iterator[Ready | Failure]:
        """As `ready`, one after the other, so that not all have to be held."""
        self._hidden = any(_reads_hidden(cell) for cell in cells)
        for cell in cells:
            yield attempt(lambda cell=cell: self._prepare(cell))
        self._recording = None  # what the layers were handed is needed no more

    def _prepare(self, cell: Candidate) -> Ready:
        recording = self._record() if self._once and replayable(cell) else None
        return self._alone(cell) if recording is None else self._replay(recording, cell)

    def _record(self) -> Recording | None:
        """The pass that all share; None where memory is too short to keep what it handed over."""
        if self._recording is None:
            start = self._now()
            recorded = partial(record, self._model, self._ids, self._spans, self._words)
            made = attempt(lambda: recorded(hidden=self._hidden))
            if isinstance(made, Failure):
                self._once = False
                return None
            self._recording, self._recorded_s = made, self._now() - start
        return self._recording

    def _replay(self, recording: Recording, cell: Candidate) -> Ready:
        recording = recording if self._shared else recording.unshare()
        start, before = self._now(), recording.observed
        cache = recording.cache(cell.request)
        times: Times = {"prefill_s": self._recorded_s, "evict_s": self._now() - start}
        times["observed"] = recording.observed > before  # else an earlier budget did it
        return Ready(cell, cache, recording.logits[0], figures_of(cache), times)

    def _alone(self, cell: Candidate) -> Ready:
        start, tokens = self._now(), self._ids.shape[1]
        cache = Cache(
            self._model,
            cell.request,
            prompt_tokens=tokens,
            spans=self._spans,
            words=self._words,
        )
        logits = read_prompt(self._model, self._ids, cache, self._chunk)
        times: Times = {"prefill_s": self._now() - start, "evict_s": None}
        return Ready(cell, cache, logits[0], figures_of(cache), times)

    def _now(self) -> float:
        synchronize(self._model.device)
        return perf_counter()


def figures_of(cache: Cache) -> dict[str, Any]:
    """What a cache holds now."""
    return {
        "held_bytes": cache.held_bytes,
        "full_bytes": cache.full_bytes,
        "entries": mean_entries(cache),
    }
