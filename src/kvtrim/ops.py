"""Tensor functions that two or more policies use, all in fp32 whatever the model's dtype.

The window score that most methods share: softmax over ALL keys first, cut to the candidates after.
"""

from typing import Literal

import torch
import torch.nn.functional as F

from kvtrim.errors import UsageError
from kvtrim.types import Bool, Float, LayerView, Tensor

Pool = Literal["none", "avg", "max"]
Reduce = Literal["sum", "mean", "max"]

_ROWS_AT_ONCE = 256  # queries per block of `column_sums`: bounds its memory to H * 256 * S floats


def attention(layer: LayerView, last: int | None = None) -> Float[Tensor, "B H W S"]:
    """Softmax weights of the last W queries (default: all at hand) over every slot.

    Query i of Q sees the slots up to its own, which is slot S - Q + i. Slots beyond a head's
    length get weight 0. Computed per KV head on packed query groups, so keys are never repeated.
    """
    queries = layer.queries if last is None else layer.queries[:, :, -last:]
    return _weights(layer, queries, layer.keys.float(), newer=0)


def column_sums(layer: LayerView) -> Float[Tensor, "B H S"]:
    """Attention that each slot received from all queries at hand, added up, in O(H * S) memory.

    Equals `attention(layer).sum(-2)`, in blocks of queries: the n x n matrix never exists.
    """
    keys, total = layer.keys.float(), layer.queries.shape[2]
    sums = keys.new_zeros(*layer.queries.shape[:2], keys.shape[2])
    for first in range(0, total, _ROWS_AT_ONCE):
        queries = layer.queries[:, :, first : first + _ROWS_AT_ONCE]
        weights = _weights(layer, queries, keys, newer=total - first - queries.shape[2])
        sums[..., : weights.shape[-1]] += weights.sum(dim=-2)
    return sums


def _weights(
    layer: LayerView,
    queries: Float[Tensor, "B H W D"],
    keys: Float[Tensor, "B K S D"],
    newer: int,
) -> Float[Tensor, "B H W V"]:
    """Weights of W queries that `newer` other queries follow, over the V slots any of them
    sees.
    """
    batch, heads, rows, width = queries.shape
    kv_heads, slots = keys.shape[1:3]
    seen = slots - newer if layer.lengths is None else slots
    packed = queries.float().reshape(batch, kv_heads, heads // kv_heads * rows, width)
    logits = packed @ keys[:, :, :seen].transpose(-1, -2) * layer.scale
    if layer.softcap is not None:
        logits = layer.softcap * torch.tanh(logits / layer.softcap)
    logits = logits.view(batch, kv_heads, -1, rows, seen)
    visible = _visible(layer, rows, newer, seen)
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    return logits.softmax(dim=-1).view(batch, heads, rows, seen)


def _visible(layer: LayerView, rows: int, newer: int, seen: int) -> Bool[Tensor, "..."] | None:
    """Which slots each query sees, [W, V] or [B, K, 1, W, V]; None when each of them sees all."""
    device = layer.keys.device
    slot = torch.arange(seen, device=device)
    own_from_end = torch.arange(rows, device=device)[:, None] - rows - newer
    if layer.lengths is None:
        return None if rows == 1 else slot <= own_from_end + seen + newer
    return slot <= own_from_end + layer.lengths.to(device)[:, :, None, None, None]


def output_factor(output: Float[Tensor, "H E M"]) -> Float[Tensor, "H E E"]:
    """R of each head with |v @ W_O| = |v @ R.T| for every v, by QR of the transposed W_O."""
    return torch.linalg.qr(output.float().transpose(1, 2), mode="r").R


def output(layer: LayerView) -> Float[Tensor, "H E M"]:
    """The layer's output projection by query head.

    Raises:
        UsageError: it was not given.
    """
    if layer.output is None or layer.factor is None:
        raise UsageError(
            "this method weighs values by the output projection; pass output=[o_proj.weight, ...]"
        )
    return layer.output()


def projected_norms(layer: LayerView) -> Float[Tensor, "B H S"]:
    """L2 norm of each slot's value after the output projection of each query head."""
    heads = output(layer).shape[0]
    factor = layer.factor() if layer.factor is not None else output_factor(output(layer))
    values = layer.values.float().repeat_interleave(heads // layer.values.shape[1], dim=1)
    return (values @ factor.transpose(-1, -2)).norm(dim=-1)


def projected_norms_l1(layer: LayerView, slots: int) -> Float[Tensor, "B K N"]:
    """L1 norm of the first slots' values after the output projection, mean over the KV group.

    No factor stands for W_O here; one head's product at a time, in blocks of slots.
    """
    kv_heads = layer.values.shape[1]
    weights = output(layer).float().unflatten(0, (kv_heads, -1))  # [K, G, E, M]
    values = layer.values[:, :, :slots].float()
    total = values.new_zeros(values.shape[:3])
    for first in range(0, slots, _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        for one in weights.unbind(1):
            total[:, :, part] += (values[:, :, part] @ one).norm(p=1, dim=-1)
    return total / weights.shape[1]


def group_output_norms(
    layer: LayerView, weights: Float[Tensor, "B H W N"]
) -> Float[Tensor, "B K N"]:
    """|sum over a group's heads of (attention column) x (value @ W_O)|, for each slot.

    Squared it is a sum over pairs of heads of (column . column') x (v W W'^T v).
    """
    kv_heads, slots = layer.values.shape[1], weights.shape[-1]
    columns = weights.unflatten(1, (kv_heads, -1))  # [B, K, G, W, N]
    projection = output(layer).float().unflatten(0, (kv_heads, -1))  # [K, G, E, M]
    values, total = layer.values[:, :, :slots].float(), 0
    for one in range(columns.shape[2]):
        for other in range(columns.shape[2]):
            overlap = (columns[:, :, one] * columns[:, :, other]).sum(dim=-2)  # [B, K, N]
            gram = projection[:, one] @ projection[:, other].transpose(-1, -2)  # [K, E, E]
            total = total + overlap * ((values @ gram) * values).sum(dim=-1)
    return torch.as_tensor(total).clamp(min=0).sqrt()


def held(layer: LayerView) -> Bool[Tensor, "B K S"]:
    """Which slots hold an entry, where KV heads hold different numbers of them."""
    slots = torch.arange(layer.keys.shape[2])
    lengths = (
        torch.full(layer.keys.shape[:2], len(slots)) if layer.lengths is None else layer.lengths
    )
    return (slots < lengths[..., None]).to(layer.keys.device)


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
