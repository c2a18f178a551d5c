"""One question under several methods; the context is read once for all that leave that pass alone.

What a method keeps and answers is what `kvtrim.generate` makes of it by itself.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch

from kvtrim.api import (
    AGNOSTIC,
    AWARE,
    Protocol,
    Result,
    Truncate,
    answer,
    fit_context,
    generate,
    window,
)
from kvtrim.bench.candidates import Candidate
from kvtrim.bench.failures import Failure, attempt
from kvtrim.hf.attach import attach
from kvtrim.hf.base import cache_keyword
from kvtrim.hf.cache import Cache
from kvtrim.hf.decode import one_by_one
from kvtrim.hf.generate import Progress, synchronize
from kvtrim.hf.replay import Recording, record
from kvtrim.prompts import Template, encode_question, repeat_words
from kvtrim.prompts.document import Document
from kvtrim.types import Tensor

ProgressOf = Callable[[Candidate], Progress]
"""Gives what is told of a method's progress."""

Look = Callable[[Candidate, Cache, Tensor, Result], None]
"""Told of a method, its cache once the prompt was read (to be left as it is), the logits [1, V] of
what follows that, and the answer."""


class Comparison:
    """Answers of several methods to one question.

    A method whose deeper layers read a part of the prompt, or that is cut while it is read, reads
    it for itself. So does every method where `prefill_chunk` wants several passes, where memory
    does not do for what the layers were handed, or where the model's own configuration asks for
    beams.

    Args:
        cells: the methods with their budgets.
        others: as `kvtrim.generate` has them.

    Raises:
        UsageError: as `kvtrim.generate`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        context: str | Document,
        question: str,
        cells: Sequence[Candidate],
        *,
        max_new_tokens: int,
        protocol: Protocol = AWARE,
        chat: bool | None = None,
        system: str | None = None,
        truncate: Truncate = "error",
        prefill_chunk: int | None = None,
    ):
        self._given, self._cells = (model, tokenizer, context, question), cells
        self.protocol, self._template = protocol, Template(chat, system)
        self._how: dict[str, Any] = {
            "protocol": protocol,
            "max_new_tokens": max_new_tokens,
            "truncate": truncate,
            "prefill_chunk": prefill_chunk,
            **vars(self._template),
        }
        around = self._template.frame(tokenizer)
        follow = encode_question(tokenizer, around, question)
        room = window(model) - max_new_tokens - len(follow)
        read_first = fit_context(tokenizer, around, context, room, truncate)
        self._whole = read_first.with_question(follow)
        self._read_first = read_first if protocol == AGNOSTIC else self._whole
        self.read_ids = self._read_first.ids  # before anything is cut
        self.then_ids = self._whole.ids[len(self.read_ids) :]  # before the answer
        self._words = repeat_words(tokenizer, around)
        self._hidden = any(cell.settled.policy.reads_hidden for cell in cells)
        self._once = one_by_one(model.generation_config)
        self._once &= prefill_chunk is None or len(self._read_first) <= prefill_chunk
        self._recording: Recording | None = None
        self.reading_s: float | None = None  # the reading that is shared, once there was one
        self.alone: list[Candidate] = []  # those that read the prompt for themselves

    def results(
        self, progress_of: ProgressOf | None = None, look: Look | None = None
    ) -> list[Result]:
        """What each method makes of it, in order.

        Seconds to the first token are those of the reading and of all that this method did after
        it: nothing that another one found out helps it.

        With `look`, methods that read the prompt for themselves read it once more for that.
        """
        found: dict[int, Result] = {}
        for number, cell in enumerate(self._cells):
            progress = progress_of and progress_of(cell)
            recording = self._share(cell, progress)
            if recording is not None:
                found[number] = self._continue(recording, cell, progress, look)
        recording = self._recording = None  # the others need the memory
        for number, cell in enumerate(self._cells):
            if number not in found:
                self.alone.append(cell)
                found[number] = self._by_itself(cell, progress_of and progress_of(cell))
                if look is not None:
                    look(cell, *self._read_alone(cell), found[number])
        return [found[number] for number in range(len(self._cells))]

    def caches(self, progress_of: ProgressOf | None = None) -> Iterator[tuple[Candidate, Cache]]:
        """What each method holds once the prompt was read; nothing is asked."""
        alone = []
        for cell in self._cells:
            recording = self._share(cell, progress_of and progress_of(cell))
            if recording is None:
                alone.append(cell)
            else:
                yield cell, self._cut(recording, cell)
        recording = self._recording = None  # the others need the memory
        for cell in alone:
            yield cell, self._read_alone(cell)[0]

    def _cut(self, recording: Recording, cell: Candidate) -> Cache:
        return recording.cache(cell.request, template=self._template)

    def _continue(
        self, recording: Recording, cell: Candidate, progress: Progress | None, look: Look | None
    ) -> Result:
        model, tokenizer, *_ = self._given
        start = perf_counter()
        cache = self._cut(recording.unshare(), cell)
        synchronize(model.device)
        spent_s = (self.reading_s or 0.0) + perf_counter() - start
        asking = {"max_new_tokens": self._how["max_new_tokens"], "progress": progress}
        if self._how["protocol"] == AGNOSTIC:
            own = generate(model, tokenizer, cache, self._given[3], **asking)
            result = replace(own, method=cell.label, compress_s=spent_s)
        else:
            asking["first"], mark = recording.logits, None if look is None else cache.mark()
            first = answer(model, tokenizer, cache, self._whole.ids, asking)
            first = replace(first, ttft_s=spent_s + first.ttft_s)
            result = Result([first], AWARE, cell.label, str(cache.keep), 0.0)
            if mark is not None:
                cache.rewind(mark)
        if look is not None:
            look(cell, cache, recording.logits, result)
        return result

    def _read_alone(self, cell: Candidate) -> tuple[Cache, Tensor]:
        """A method's cache after its own reading of the prompt, and the logits [1, V] then."""
        model, prompt, chunk = self._given[0], self._read_first, self._how["prefill_chunk"]
        more = {"words": self._words, "template": self._template, "spans": prompt.spans}
        length = len(prompt)
        cache = Cache(model, cell.request, prompt_tokens=length, **more)
        ids = torch.tensor([prompt.ids], device=model.device)
        logits = torch.empty(0)  # of no part: a prompt has some
        with torch.no_grad(), attach(model):
            for part in ids.split(chunk or length, dim=1):
                output = model(input_ids=part, **cache_keyword(cache), logits_to_keep=1)
                logits = output.logits[:, -1]
        return cache, logits

    def _by_itself(self, cell: Candidate, progress: Progress | None) -> Result:
        own = {"method": cell.request, "progress": progress}
        made = generate(*self._given, **(own | self._how))
        return replace(made, method=cell.label)

    def _share(self, cell: Candidate, progress: Progress | None) -> Recording | None:
        """The reading, if this method can go on from it."""
        model = self._given[0]
        own = Cache(model, cell.request, prompt_tokens=1).method
        if not self._once or own.propagation.narrows or own.schedule.chunks:
            return None
        if self._recording is None:
            made = attempt(lambda: self._read(progress))
            if isinstance(made, Failure):
                self._once = False
                return None
            self._recording = made
        return self._recording

    def _read(self, progress: Progress | None) -> Recording:
        model, prompt = self._given[0], self._read_first
        more = self._how["max_new_tokens"] - 1
        Cache(model, "full").require_reach(len(prompt), len(self._whole) + more)
        synchronize(model.device)
        start = perf_counter()
        ids = torch.tensor([prompt.ids], device=model.device)
        made = record(model, ids, prompt.spans, self._words, self._hidden, progress)
        synchronize(model.device)
        self.reading_s = perf_counter() - start
        return made
