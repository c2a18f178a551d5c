"""What methods keep of one prompt, with their answers: what `kvtrim view` and `compare` show.

At every stop (a method with a budget) a cache is made of the prompt, question-agnostic or
question-aware as the comparison has it. With a question each stop's own answer stands beside the
log-probability that its cache gives to the full cache's answer.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from kvtrim.api import Result, generate
from kvtrim.bench.candidates import Candidate
from kvtrim.bench.comparison import Comparison, ProgressOf
from kvtrim.bench.eval.decode import Reference, fits, make_branch
from kvtrim.hf.attach import attach
from kvtrim.hf.cache import Cache
from kvtrim.hf.generate import Progress, read
from kvtrim.hf.view import ABOUT, name_rest, stop_of, token_ids, view
from kvtrim.prompts import Template, encode_question
from kvtrim.prompts.detokenizer import pieces
from kvtrim.report.viewer import evidence as places
from kvtrim.report.viewer.exhibit import Exhibit, Said, Stop
from kvtrim.types import Tensor


class Showing:
    """The stops of one comparison, gathered as it goes along.

    Args:
        comparison: whose first cell is the full cache, where something is asked.
        question: None where nothing is.
    """

    def __init__(self, model: Any, tokenizer: Any, comparison: Comparison, question: str | None):
        self._model, self._tokenizer = model, tokenizer
        self._comparison, self._question = comparison, question
        self._stops: list[Stop] = []
        self._first: Result | None = None
        self._layers: Sequence[int] = ()
        self._about: list[str] = []

    def require_evidence(self, evidence: Sequence[str]) -> None:
        """Refuse evidence that the prompt does not have, before anything is read.

        Raises:
            UsageError: naming it.
        """
        if evidence:
            places.find(self._pieces, evidence)

    @cached_property
    def _pieces(self) -> list[str]:
        return pieces(self._tokenizer, self._comparison.read_ids)

    def results(self, progress_of: ProgressOf | None = None) -> list[Result]:
        """The answers; what their caches held is noted."""
        return self._comparison.results(progress_of, self._look)

    def caches(self, progress_of: ProgressOf | None = None) -> None:
        """Note what the caches hold, where nothing is asked."""
        for cell, cache in self._comparison.caches(progress_of):
            self._note(cell, cache, None)

    def exhibit(self, label: str, evidence: Sequence[str] = ()) -> Exhibit:
        """What was noted, as a page.

        Args:
            label: what the user calls the model.
            evidence: texts that the answer needs; by default its own words, where the prompt has
                them.

        Raises:
            UsageError: evidence that is not in the prompt.
        """
        shown = self._pieces
        answer = "" if self._first is None else self._first.text
        found = places.find(shown, evidence)
        if not evidence and answer:
            found = places.find_answer(shown, answer, self._question or "")
        about = [f"Model {label}.", ABOUT[self._comparison.protocol], *self._about]
        return Exhibit(
            shown,
            sorted(self._stops, key=lambda stop: stop.keep != "all"),
            about,
            self._layers,
            self._question,
            answer or None,
            found,
        )

    def _look(self, cell: Candidate, cache: Cache, logits: Tensor, result: Result) -> None:
        if self._first is None:
            self._first = result
        lead, gold = self._comparison.then_ids, self._first.answers[0].token_ids
        log_prob = log_prob_of(self._model, cache, lead, gold, logits)
        self._note(cell, cache, Said(result.text, log_prob))

    def _note(self, cell: Candidate, cache: Cache, said: Said | None) -> None:
        self._stops.append(replace(stop_of(cache, said), method=cell.label))
        self._layers, self._about = cache.managed, name_rest(cache)


def log_prob_of(
    model: Any, cache: Cache, lead: list[int], gold: list[int], logits: Tensor | None = None
) -> float | None:
    """What a cache of one prompt, which stays as it was, gives to an answer: nats, all its tokens
    together; None where there are none.

    Args:
        lead: token ids between what the cache has read and the answer.
        logits: [1, V] of the token after what was read; needed where nothing leads to the answer.
    """
    mark = cache.mark()
    try:
        with attach(model):
            after = [] if logits is None else [logits[0]]
            branch = make_branch(model, [cache], after, lead, cache.seen + len(lead))
            loss = fits(model, branch, gold, 0, Reference())[0].loss
    finally:
        cache.rewind(mark)
    return None if loss is None else -loss * len(gold)


def show_cache(
    model: Any,
    tokenizer: Any,
    cache: Cache,
    question: str,
    *,
    evidence: Sequence[str] = (),
    max_new_tokens: int,
    progress: Progress | None = None,
) -> Exhibit:
    """A cache of one document that is there, asked as any other stop: beside the full cache.

    The document's tokens are read once more for that. Other arguments and errors as `view` and
    `kvtrim.generate`.
    """
    ids = token_ids(cache)
    full = Cache(model, "full", prompt_tokens=len(ids), template=cache.template)
    asking = {"max_new_tokens": max_new_tokens, "progress": progress}
    own = generate(model, tokenizer, cache, question, **asking)  # which refuses what is too long
    with attach(model):
        read(model, torch.tensor([ids], device=model.device), full, None, progress)
    first = generate(model, tokenizer, full, question, **asking)
    around = (cache.template or Template()).frame(tokenizer)
    lead, gold = encode_question(tokenizer, around, question).ids, first.answers[0].token_ids
    said = [
        Said(r.text, log_prob_of(model, c, lead, gold)) for c, r in ((full, first), (cache, own))
    ]
    shown = view([full, cache], tokenizer, evidence=evidence, question=question, said=first.text)
    stops = [replace(stop, said=each) for stop, each in zip(shown.stops, said, strict=True)]
    return replace(shown, stops=stops, reference=first.text or None)
