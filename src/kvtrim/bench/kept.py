"""What methods keep of one prompt, with their answers: what `kvtrim view` and `compare` show.

At every stop (a method with a budget) a cache is made of the prompt, question-agnostic or
question-aware as the comparison has it. With a question each stop's own answer stands beside the
log-probability that its cache gives to the full cache's answer.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from kvtrim.api import Result
from kvtrim.bench.candidates import Candidate
from kvtrim.bench.comparison import Comparison, ProgressOf
from kvtrim.bench.eval.decode import Reference, fits, make_branch
from kvtrim.hf.attach import attach
from kvtrim.hf.cache import Cache
from kvtrim.hf.view import ABOUT, name_rest, stop_of
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
        gold = self._first.answers[0].token_ids
        mark = cache.mark()
        try:
            with attach(self._model):
                lead = self._comparison.then_ids
                length = len(self._comparison.read_ids) + len(lead)
                branch = make_branch(self._model, [cache], [logits[0]], lead, length)
                fit = fits(self._model, branch, gold, 0, Reference())[0]
        finally:
            cache.rewind(mark)
        log_prob = None if fit.loss is None else -fit.loss * len(gold)
        self._note(cell, cache, Said(result.text, log_prob))

    def _note(self, cell: Candidate, cache: Cache, said: Said | None) -> None:
        self._stops.append(replace(stop_of(cache, said), method=cell.label))
        self._layers, self._about = cache.managed, name_rest(cache)
