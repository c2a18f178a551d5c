"""Tensor functions that two or more policies use, all in fp32 whatever the model's dtype.

The window score that most methods share: softmax over ALL keys first, cut to the candidates after.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F

from kvtrim.errors import UsageError
from kvtrim.kernels.available import FORMATS, WIDEST, obstacle
from kvtrim.methods.unit_numbers import unit_numbers
from kvtrim.types import Bool, Counts, Float, Int, LayerView, Noted, Tensor

Pool = Literal["none", "avg", "max"]
Reduce = Literal["sum", "mean", "max"]
Weights = Bool[Tensor, "B Q"] | Float[Tensor, "B Q"]
"""What each query counts for: a weight, or yes and no."""

_ELEMENTS = {"cuda": 2**26, "cpu": 2**20}
"""Weights in a block: what fills a GPU, and what the caches behind a processor's thread hold."""


def attention(layer: LayerView, last: int | None = None) -> Float[Tensor, "B H W S"]:
    """Softmax weights of the last W queries (default: all at hand) over every slot.

    Query i of Q sees the slots up to its own, which is slot S - Q + i. Slots beyond a head's
    length get weight 0. Computed per KV head on packed query groups, so keys are never repeated.
    """
    queries = layer.queries if last is None else layer.queries[:, :, -last:]
    return _weights(layer, queries, layer.keys.float(), newer=0)


def column_sums(
    layer: LayerView, observers: Weights | None = None, own: bool = True
) -> Float[Tensor, "B H S"]:
    """Attention that each slot received from all queries at hand, added up, in O(H * S) memory.

    Equals `attention(layer).sum(-2)`, in blocks of queries: the n x n matrix never exists.

    Args:
        observers: what each query counts for, all alike by default; blocks of zeros cost nothing.
        own: what a query pays to its own slot counts too.
    """
    if _has_kernel(layer):
        from kvtrim.kernels import columns

        weights = None if observers is None else observers.to(layer.keys.device)
        return columns.sums(
            layer.queries, layer.keys, layer.scale, layer.softcap, layer.lengths, weights, own
        )
    sums = layer.keys.new_zeros(*layer.queries.shape[:2], layer.keys.shape[2], dtype=torch.float32)
    for weights in _blocks(layer, observers, own):
        sums[..., : weights.shape[-1]] += weights.sum(dim=-2)
    return sums


def _has_kernel(layer: LayerView) -> bool:
    """Whether the sums can be made without the weights themselves: on CUDA, by Triton."""
    fits = layer.keys.is_cuda and layer.keys.dtype in FORMATS and layer.keys.shape[-1] <= WIDEST
    return fits and layer.bias is None and obstacle("cuda") is None


def column_max(layer: LayerView, observers: Weights | None = None) -> Float[Tensor, "B H S"]:
    """Largest attention that each slot received from any query at hand, times the query's weight.

    Memory and `observers` as above.
    """
    if _has_kernel(layer):
        from kvtrim.kernels import columns

        weights = None if observers is None else observers.to(layer.keys.device)
        return columns.largest(
            layer.queries, layer.keys, layer.scale, layer.softcap, layer.lengths, weights
        )
    most = layer.keys.new_zeros(*layer.queries.shape[:2], layer.keys.shape[2], dtype=torch.float32)
    for weights in _blocks(layer, observers):
        seen = most[..., : weights.shape[-1]]
        torch.maximum(seen, weights.amax(dim=-2), out=seen)
    return most


def _blocks(
    layer: LayerView, observers: Weights | None = None, own: bool = True
) -> Iterator[Float[Tensor, "B H W V"]]:
    """Attention weights of all queries at hand (or the observers), a block of them at a time."""
    keys, total, step = layer.keys.float(), layer.queries.shape[2], _rows_at_once(layer)
    for first in range(0, total, step):
        queries = layer.queries[:, :, first : first + step]
        voting = None if observers is None else observers[:, first : first + step]
        if voting is not None and not bool(voting.any()):
            continue
        weights = _weights(layer, queries, keys, total - first - queries.shape[2], own)
        yield weights if voting is None else weights * voting[:, None, :, None]


def _rows_at_once(layer: LayerView) -> int:
    """Queries in a block of weights."""
    kind = "cuda" if layer.keys.is_cuda else "cpu"
    most = _ELEMENTS[kind] * (1 if kind == "cuda" else torch.get_num_threads())
    slots = layer.queries.shape[0] * layer.queries.shape[1] * layer.keys.shape[2]
    return max(16, most // max(1, slots))


def queries_in(layer: LayerView, part: str) -> Bool[Tensor, "B Q"]:
    """Which of the queries at hand stand in a named part of their prompt.

    Raises:
        UsageError: the prompt does not name that part.
    """
    if not layer.spans or not all(spans.get(part) for spans in layer.spans):
        raise UsageError(
            f"this method needs to know where the {part} is: read it together with the context "
            f"(question-aware), or say so: kvtrim.Cache(..., spans={{'{part}': [(start, end)]}})"
        )
    own = layer.positions[:, 0, layer.keys.shape[2] - layer.queries.shape[2] :]
    numbers = [unit_numbers(spans, part, at) for spans, at in zip(layer.spans, own, strict=True)]
    return torch.stack(numbers) >= 0


def _weights(
    layer: LayerView,
    queries: Float[Tensor, "B H W D"],
    keys: Float[Tensor, "B K S D"],
    newer: int,
    own: bool = True,
) -> Float[Tensor, "B H W V"]:
    """Weights of W queries, `newer` others behind them, over the V slots any of the W sees.

    The weight of a query's own slot is 0 unless `own`.
    """
    batch, heads, rows, width = queries.shape
    kv_heads, slots = keys.shape[1:3]
    seen = slots - newer if layer.lengths is None else slots
    packed = (queries.float() * layer.scale).reshape(batch, kv_heads, -1, width)
    logits = packed @ keys[:, :, :seen].transpose(-1, -2)
    if layer.softcap is not None:
        logits = layer.softcap * torch.tanh(logits / layer.softcap)
    logits = logits.view(batch, kv_heads, -1, rows, seen)
    if layer.bias is not None:
        logits = logits + layer.bias[:, :, None, None, :seen]
    slot = torch.arange(seen, device=logits.device)
    last = _own_slots(layer, rows, newer, seen)
    if layer.lengths is not None:
        logits.masked_fill_(slot > last, -torch.inf)
    elif rows > 1:  # only the slots of these queries can lie ahead of one of them
        logits[..., seen - rows :].masked_fill_(slot[seen - rows :] > last, -torch.inf)
    weights = logits.softmax(dim=-1)
    if not own:
        weights.scatter_(-1, last.expand(*weights.shape[:-1], 1), 0)
    return weights.view(batch, heads, rows, seen)


def _own_slots(layer: LayerView, rows: int, newer: int, seen: int) -> Int[Tensor, "..."]:
    """The slot of each query's own token, the last it sees: [W, 1] or [B, K, 1, W, 1]."""
    device = layer.keys.device
    from_end = torch.arange(rows, device=device)[:, None] - rows - newer
    if layer.lengths is None:
        return from_end + seen + newer
    return from_end + layer.lengths.to(device)[:, :, None, None, None]


def window_attention(
    layer: LayerView, window: int, last: int | None = None
) -> Float[Tensor, "B H W N"]:
    """Weights that the last queries (the window's, or fewer) give the slots before the window."""
    weights = attention(layer, last=window if last is None else last)
    weights = weights[..., : layer.keys.shape[2] - window]
    if layer.lengths is None:
        return weights
    groups = weights.shape[1] // layer.keys.shape[1]
    behind = _behind(layer, weights.shape[-1], window).repeat_interleave(groups, dim=1)
    return weights.masked_fill(behind[:, :, None], 0)


def window_sums(layer: LayerView, window: int) -> Float[Tensor, "B H N"]:
    """`window_attention` added up over the queries, where possible without the weights."""
    if not _has_kernel(layer):
        return window_attention(layer, window).sum(dim=-2)
    sums = column_sums(newest(layer, window))
    sums = sums[..., : layer.keys.shape[2] - window]
    if layer.lengths is None:
        return sums
    groups = sums.shape[1] // layer.keys.shape[1]
    behind = _behind(layer, sums.shape[-1], window)
    return sums.masked_fill(behind.repeat_interleave(groups, dim=1), 0)


def hidden(layer: LayerView) -> Float[Tensor, "B Q M"]:
    """What the layer's attention received for each query's token.

    Raises:
        UsageError: it was not given.
    """
    if layer.hidden is None:
        raise UsageError("this method reads hidden states; pass hidden=[states, ...]")
    return layer.hidden


def newest(layer: LayerView, count: int) -> LayerView:
    """The layer as if only the newest so many queries were at hand."""
    first = max(0, layer.queries.shape[2] - count)
    hidden = None if layer.hidden is None else layer.hidden[:, first:]
    return replace(layer, queries=layer.queries[:, :, first:], hidden=hidden)


def length_of(vectors: Float[Tensor, "*B D"]) -> Float[Tensor, "*B"]:
    """L2 norm of the last dimension."""
    return torch.linalg.vector_norm(vectors, dim=-1)


def variance_of(weights: Float[Tensor, "B H W N"]) -> Float[Tensor, "B H N"]:
    """Unbiased variance over the queries; several times faster on a CPU than torch's own."""
    apart = weights - weights.mean(dim=-2, keepdim=True)
    return (apart * apart).sum(dim=-2) / (weights.shape[-2] - 1)


def reduce_group(
    scores: Float[Tensor, "B H N"], kv_heads: int, how: Reduce
) -> Float[Tensor, "B K N"]:
    """One score per KV head from the query heads that share it."""
    grouped = scores.unflatten(1, (kv_heads, -1))
    if how == "max":
        return grouped.amax(dim=2)
    return grouped.sum(dim=2) if how == "sum" else grouped.mean(dim=2)


def pool(scores: Float[Tensor, "*B N"], kernel: int, how: Pool) -> Float[Tensor, "*B N"]:
    """Smooth over neighbouring slots, stride 1, same length; `kernel` must be odd.

    `avg` pads with zeros and always divides by the kernel, so it damps the ends; `max` does not.
    """
    if how == "none" or kernel == 1 or scores.shape[-1] == 0:
        return scores
    flat = scores.reshape(1, -1, scores.shape[-1])
    run = F.max_pool1d if how == "max" else F.avg_pool1d
    return run(flat, kernel, stride=1, padding=kernel // 2).view_as(scores)


def lengths(layer: LayerView) -> Counts:
    """Slots that each KV head holds, on the device of the layer's keys."""
    if layer.lengths is not None:
        return layer.lengths.to(layer.keys.device)
    return torch.full(layer.keys.shape[:2], layer.keys.shape[2], device=layer.keys.device)


def clear_window(
    layer: LayerView, rows: Float[Tensor, "B K S D"], window: int = 0
) -> Float[Tensor, "B K S D"]:
    """The layer's keys or values with zeros in each head's window and in the slots behind it."""
    if layer.lengths is None and not window:
        return rows
    return rows.masked_fill(_behind(layer, rows.shape[2], window)[..., None], 0)


def _behind(layer: LayerView, slots: int, window: int) -> Bool[Tensor, "B K S"]:
    """Which of the first slots belong to a head's window or hold nothing."""
    return torch.arange(slots, device=layer.keys.device) >= (lengths(layer) - window)[..., None]


def largest(layer: LayerView, noted: Noted) -> Float[Tensor, "B H N"]:
    """Largest weight of some slots in a softmax over them and the queries' own.

    Taken from attention where that noted it, else by a product of its own.
    """
    if layer.received is not None:
        return layer.received
    held = layer.keys.shape[2]
    own = torch.arange(held - layer.queries.shape[2], held)
    part = narrow(layer, torch.cat([noted.slots, own]))
    return column_max(part, noted.weights)[..., : len(noted.slots)]


def narrow(layer: LayerView, slots: Int[Tensor, " N"]) -> LayerView:
    """The layer as if every head held these slots alone, the newest queries' own among them."""
    slots = slots.to(layer.keys.device)
    keys, values = layer.keys[:, :, slots], layer.values[:, :, slots]
    positions = layer.positions[:, :, slots]
    bias = None if layer.bias is None else layer.bias[:, :, slots]
    return replace(layer, keys=keys, values=values, positions=positions, carried=None, bias=bias)
