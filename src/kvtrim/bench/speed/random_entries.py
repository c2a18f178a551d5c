"""Caches filled with random entries: decoding depends on what is held, not on what was read.

So the time of a step after 128k tokens can be measured without reading them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kvtrim.bench.candidates import Subject, capture_steps, make_feed
from kvtrim.hf.attach import attach
from kvtrim.hf.cache import Cache
from kvtrim.hf.fill import fill, heads_of
from kvtrim.hf.generate import plain_cache
from kvtrim.types import Counts

LEAST, MOST = 0.2, 1.8
"""Heads hold between these shares of the mean, where they differ."""


def spread(held: int, rows: int, heads: int, layer: int) -> Counts:
    """Different lengths of a layer's heads, `held` on average; another head first in every row."""
    uneven = torch.linspace(LEAST, MOST, heads).mul(held).long()
    uneven[-1] += held * heads - int(uneven.sum())
    return torch.stack([uneven.roll(layer + row) for row in range(rows)])


@contextmanager
def ours(
    model: Any, rows: int, held: int, per_head: bool, capture: bool, impl: str = "auto"
) -> Iterator[Subject]:
    """A kvtrim cache that holds so many entries per head, and the model attached for it."""
    with attach(model):
        cache = Cache(model, "adakv" if per_head else "snapkv", 1.0, impl=impl)
        heads, seen = heads_of(model)[0], held
        lengths = [torch.full((rows, heads), held) for _ in cache.managed]
        if per_head:
            lengths = [spread(held, rows, heads, layer) for layer in range(len(lengths))]
            seen = int(torch.stack(lengths).max())
        fill(cache, model, lengths, seen)
        steps = capture_steps(model, cache, capture)
        yield Subject(cache, make_feed(model, cache), captured=steps)


@contextmanager
def theirs(model: Any, rows: int, held: int) -> Iterator[Subject]:
    """Transformers' own cache with so many entries, kvtrim not attached."""
    cache, (heads, width) = plain_cache(model), heads_of(model)
    for layer in range(len(model.get_decoder().layers)):
        keys, values = torch.randn(
            2, rows, heads, held, width, device=model.device, dtype=model.dtype
        )
        cache.update(keys, values, layer)
    yield Subject(cache, make_feed(model, cache))
