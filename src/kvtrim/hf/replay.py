"""One prefill, many methods: what a full prefill handed to each layer, and caches made from it.

Methods that only evict leave the prefill's hidden states as they are, so their caches can be made
from one recorded pass. The result is the cache that a pass of their own would have made. What a
policy observes in the prompt or in its probe does not depend on the budget and is kept as well.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from kvtrim.engine.layer import Call
from kvtrim.engine.refit import Aims
from kvtrim.errors import UsageError
from kvtrim.hf.attach import attach
from kvtrim.hf.cache import Cache
from kvtrim.hf.generate import Progress, watched
from kvtrim.hf.keyword import passing
from kvtrim.hf.probe import probe
from kvtrim.methods.keep import Keep
from kvtrim.methods.method import Method
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
    _known: dict[Hashable, dict[int, Tensor]] = field(default_factory=dict)
    _aims: dict[Hashable, Aims] = field(default_factory=dict)

    def cache(
        self, method: str | Method, keep: int | float | str | Keep, **settings: Any
    ) -> Cache:
        """The cache that a method would have after this prompt.

        Raises:
            UsageError: a method whose deeper layers read a part of the prompt, so that its own
                prefill is another one, or that reads hidden states where none were recorded;
                and as `kvtrim.Cache`.
        """
        settings = {"spans": self.spans, **settings}
        other = self.full.copy_stock(Cache(self.model, method, keep, **settings))
        words = settings.get("tokenizer") is not None or self.words is not None
        other.words = self.words or other.words
        if other.method.propagation.narrows or other.method.schedule.chunks:
            raise UsageError(
                f"{method} changes the prefill itself and needs one of its own: read the prompt "
                "into a kvtrim.Cache"
            )
        if other.method.policy.reads_hidden and any(call.hidden is None for call in self.calls):
            raise UsageError(
                f"{method} reads hidden states, and this pass was recorded without them; "
                "use record(..., hidden=True)"
            )
        calls = self.calls
        if other.rotations:
            turning = zip(self.calls, other.rotations, strict=True)
            calls = [replace(call, rotate=rotate) for call, rotate in turning]
        which = (other.method.policy, other.method.granularity, words)
        refit = other.method.refit
        other.session.known = self._known.setdefault(which, {})
        if refit.changes:
            other.session.aims = self._aims.setdefault((which, refit.queries, refit.behind), {})
        rows, columns = self.ids.shape
        other.begin_pass(rows, columns, None, self.ids)
        for index, call in enumerate(calls):
            other.session.absorb(index, call)
        other.end_pass()
        if other.session.probe_due:
            self._probe(other)
        other.session.known = other.session.aims = None
        return other

    def unshared(self) -> "Recording":
        """The same pass with nothing kept of what policies observed: to time one by itself."""
        return replace(self, _known={}, _aims={})

    @property
    def observed(self) -> int:
        """How many observations of policies are kept for their other budgets."""
        return sum(map(len, self._known.values()))

    def _probe(self, other: Cache) -> None:
        """Read the probe, or cut by what it found before."""
        if not other.session.known or other.session.aims == {}:
            if other.session.known:
                other.session.known.clear()  # what is asked again is seen again
            with attach(self.model):
                probe(self.model.get_decoder(), other)
            return
        rows = self.ids.shape[0]
        other.session.begin_probe(0, None, [Probed(0, 0)] * rows, last=True)
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
    cache, calls = Cache(model, "full"), {}
    cache.session.tap = calls.__setitem__ if hidden else partial(_without_hidden, calls)
    with torch.no_grad(), attach(model), watched(model, cache, ids.shape[1], progress):
        logits = model(input_ids=ids, **passing(cache), logits_to_keep=1).logits[:, -1]
    cache.session.tap = None
    handed = [calls[index] for index in sorted(calls)]
    return Recording(model, ids, logits, cache, handed, spans, words)


def _without_hidden(calls: dict[int, Call], index: int, call: Call) -> None:
    calls[index] = replace(call, hidden=None)
