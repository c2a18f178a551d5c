"""A cache as if it had read a prompt, with random entries: to measure what holding them costs."""

from typing import Any

import torch

from kvtrim.cache.store import LayerStore
from kvtrim.hf.cache import Cache
from kvtrim.hf.models.architectures import head_width
from kvtrim.types import Counts


def fill(cache: Cache, model: Any, lengths: list[Counts], seen: int) -> None:
    """Bring a new cache to where it has read prompts and holds random entries of them.

    Args:
        lengths: entries per prompt and KV head, for each layer.
        seen: tokens that were read, as many at least as any head holds.
    """
    state, (heads, width) = cache.session.state, heads_of(model)
    for layer, length in zip(state.layers, lengths, strict=True):
        total = int(length.sum())
        keys, values = (
            torch.randn(total, width, device=model.device, dtype=model.dtype) for _ in range(2)
        )
        steps = [torch.arange(count) for count in length.flatten().tolist()]
        positions = torch.cat(steps).int().to(model.device)
        buffers = {"keys": keys, "values": values, "positions": positions}
        layer.store = LayerStore.pack(buffers, length)
        layer.full_entry = heads * 2 * width * keys.element_size()
    rows = len(lengths[0])
    state.reading.seen, state.reading.lengths = seen, [seen] * rows
    state.keeps, state.cut_at = [(seen, float(seen))] * rows, seen
    cache.token_ids = torch.zeros(rows, seen, dtype=torch.int64, device=model.device)


def heads_of(model: Any) -> tuple[int, int]:
    """KV heads of a layer, and the width of a head."""
    config = model.config.get_text_config(decoder=True)
    return config.num_key_value_heads, head_width(config)
