"""One prefill, many methods: what a full prefill handed to each layer, and caches made from it.

Methods that only evict leave the prefill's hidden states as they are, so their caches can be made
from one recorded pass. The result is the cache that a pass of their own would have made.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvtrim.budgets import Keep
from kvtrim.engine.call import Call
from kvtrim.hf.attach import attach
from kvtrim.hf.cache import Cache
from kvtrim.hf.probing import probe
from kvtrim.methods import Method
from kvtrim.spans import Given
from kvtrim.types import Float, Int, Tensor


@dataclass(frozen=True)
class Recording:
    """A prompt that was read once with nothing evicted."""

    model: Any
    ids: Int[Tensor, "B n"]
    logits: Float[Tensor, "B V"]  # of the token after the prompt
    full: Cache  # the full cache
    calls: list[Call]  # one per managed layer
    spans: Given | Sequence[Given] | None = None  # named parts of the prompt, as `Cache` has them

    def cache(
        self, method: str | Method, keep: int | float | str | Keep, **settings: Any
    ) -> Cache:
        """The cache that a method would have after this prompt; errors as `kvtrim.Cache`."""
        settings = {"spans": self.spans, **settings}
        other = self.full.copy_stock(Cache(self.model, method, keep, **settings))
        rows, columns = self.ids.shape
        other.begin_pass(rows, columns, None, self.ids)
        for index, call in enumerate(self.calls):
            other.session.absorb(index, call)
        other.end_pass()
        if other.session.probe_due:
            with attach(self.model):
                probe(self.model.get_decoder(), other)
        return other


def record(
    model: Any, ids: Int[Tensor, "B n"], spans: Given | Sequence[Given] | None = None
) -> Recording:
    """Read a prompt without padding, once, and keep what its layers were handed."""
    cache, calls = Cache(model, "full"), {}
    cache.session.tap = calls.__setitem__
    with torch.no_grad(), attach(model):
        logits = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    cache.session.tap = None
    return Recording(model, ids, logits, cache, [calls[index] for index in sorted(calls)], spans)
