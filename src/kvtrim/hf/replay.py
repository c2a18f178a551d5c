"""One prefill, many methods: what a full prefill handed to each layer, and caches made from it.

Methods that only evict leave the prefill's hidden states as they are, so their caches can be made
from one recorded pass. The result is the cache that a pass of their own would have made. What a
policy observes in the prompt or in its probe does not depend on the budget and is kept as well.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kvtrim.engine.cuts import Known
from kvtrim.engine.layer import Call
from kvtrim.engine.refit import Aims
from kvtrim.errors import UsageError
from kvtrim.hf.attach import attach
from kvtrim.hf.base import Coming, cache_keyword
from kvtrim.hf.cache import Cache
from kvtrim.hf.generate import Progress, watch
from kvtrim.hf.probe import probe
from kvtrim.methods.keep import Keep
from kvtrim.methods.method import Method
from kvtrim.methods.request import Request
from kvtrim.prompts import Words
from kvtrim.prompts.spans import Given
from kvtrim.types import Float, Int, Probed, Tensor


@dataclass(frozen=True)
class Recording:
    """A prompt that was read once with nothing evicted."""

    model: Any
    ids: Int[Tensor, "B n"]
    logits: Float[Tensor, "B V"]  # of the token after the prompt
    full: Cache  # the full cache
    calls: list[Call]  # one per managed layer
    spans: Given | Sequence[Given] | None = None  # named parts of the prompt, as `Cache` has them
    words: Words | None = None  # for methods that probe in words; else by the `tokenizer` setting
    _statistics: dict[Hashable, dict[int, Tensor]] = field(default_factory=dict)
    _aims: dict[Hashable, Aims] = field(default_factory=dict)

    def cache(
        self,
        method: str | Method | Request,
        keep: int | float | str | Keep = 1.0,
        **settings: Any,
    ) -> Cache:
        """The cache that a method would have after this prompt.

        Raises:
            UsageError: a method whose deeper layers read a part of the prompt, so that its own
                prefill is another one, or that reads hidden states where none were recorded;
                and as `kvtrim.Cache`.
        """
        settings = {"spans": self.spans, "words": self.words, **settings}
        other = self.full.copy_stock(Cache(self.model, method, keep, **settings))
        if other.method.propagation.narrows or other.method.schedule.chunks:
            raise UsageError(
                f"{other.request.name} changes the prefill itself and needs one of its own: read "
                "the prompt into a kvtrim.Cache"
            )
        if other.method.policy.reads_hidden and any(call.hidden is None for call in self.calls):
            raise UsageError(
                f"{other.request.name} reads hidden states, and this pass was recorded without "
                "them; use record(..., hidden=True)"
            )
        calls = self.calls
        if other.rotations:
            turning = zip(self.calls, other.rotations, strict=True)
            calls = [replace(call, rotate=rotate) for call, rotate in turning]
        known = self._statistics_of(other)
        rows, columns = self.ids.shape
        other.begin_pass(Coming(rows, columns, None, self.ids), known)
        for index, call in enumerate(calls):
            other.session.absorb(index, call)
        if other.end_pass():
            self._probe(other, known)
        return other

    def _statistics_of(self, other: Cache) -> Known:
        """What earlier caches of the same policy came to."""
        refit, words = other.method.refit, other.words != Words()
        which = (other.method.policy, other.method.granularity, words)
        statistics = self._statistics.setdefault(which, {})
        if not refit.changes:
            return Known(statistics)
        same = (which, refit.queries, refit.behind, refit.last)
        return Known(statistics, self._aims.setdefault(same, {}))

    def unshare(self) -> "Recording":
        """The same pass with nothing kept of what policies observed: to time one by itself."""
        return replace(self, _statistics={}, _aims={})

    @property
    def observed(self) -> int:
        """How many observations of policies are kept for their other budgets."""
        return sum(map(len, self._statistics.values()))

    def _probe(self, other: Cache, known: Known) -> None:
        """Read the probe, or cut by what it found before."""
        if not known.statistics or known.aims == {}:
            known.statistics.clear()  # what is asked again is seen again
            with attach(self.model):
                probe(self.model.get_decoder(), other, known)
            return
        nothing = [Probed(0, 0)] * self.ids.shape[0]
        other.session.begin_probe(0, None, nothing, last=True, known=known)
        for index, call in enumerate(self.calls):
            other.session.absorb(index, call.without_tokens())
        other.session.end()


def record(
    model: Any,
    ids: Int[Tensor, "B n"],
    spans: Given | Sequence[Given] | None = None,
    words: Words | None = None,
    hidden: bool = True,
    progress: Progress | None = None,
) -> Recording:
    """Read a prompt without padding, once, and keep what its layers were handed.

    Args:
        hidden: keep what their attention received, too, for methods that read it.
        progress: told of every layer.
    """
    calls: dict[int, Call] = {}

    def note(index: int, call: Call) -> None:
        calls.setdefault(index, call if hidden else replace(call, hidden=None))

    cache = Cache(model, "full", tap=note)
    with torch.no_grad(), attach(model), watch(model, cache, ids.shape[1], progress):
        logits = model(input_ids=ids, **cache_keyword(cache), logits_to_keep=1).logits[:, -1]
    handed = [calls[index] for index in sorted(calls)]
    return Recording(model, ids, logits, cache, handed, spans, words)
