"""Attention through torch's scaled_dot_product_attention: CPU path and fallback everywhere."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention.bias import causal_lower_right

from kvtrim.types import Bool, Counts, Float, Int, Tensor

_ROWS_AT_ONCE = 256  # queries under one mask: it takes this many rows of slots, never n x n


def causal(
    queries: Float[Tensor, "B H Q D"],
    keys: Float[Tensor, "B K Q D"],
    values: Float[Tensor, "B K Q E"],
    scale: float,
    softcap: float | None = None,
) -> Float[Tensor, "B H Q E"]:
    """Causal self-attention of a whole prompt."""
    if softcap is not None:
        return up_to(queries, keys, values, _newest(queries, keys), scale, softcap)
    return F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        is_causal=queries.shape[2] > 1,
        scale=scale,
        enable_gqa=_shares_heads(queries, keys),
    )


def dense(
    queries: Float[Tensor, "B H Q D"],
    keys: Float[Tensor, "B K S D"],
    values: Float[Tensor, "B K S E"],
    scale: float,
    softcap: float | None = None,
    bias: Float[Tensor, "B K S"] | None = None,
) -> Float[Tensor, "B H Q E"]:
    """Attend to S slots per KV head, the last Q of which belong to the queries.

    `bias` is added to the logits of each slot.
    """
    if queries.shape[2] == keys.shape[2] and bias is None:
        return causal(queries, keys, values, scale, softcap)
    if softcap is None and bias is None and _flash(queries, keys, values):
        mask = causal_lower_right(queries.shape[2], keys.shape[2])
        given, grouped = (queries, keys, values), _shares_heads(queries, keys)
        return F.scaled_dot_product_attention(
            *given, attn_mask=mask, scale=scale, enable_gqa=grouped
        )
    return up_to(queries, keys, values, _newest(queries, keys), scale, softcap, bias)


def _shares_heads(queries: Tensor, keys: Tensor) -> bool:
    """Whether query heads share KV heads."""
    return queries.shape[1] != keys.shape[1]


def _flash(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether torch's FlashAttention takes these, which needs no mask to stop at each query."""
    if not queries.is_cuda or queries.shape[2] == 1:
        return False
    given = queries, keys, values, None, 0.0, False, _shares_heads(queries, keys)
    return can_use_flash_attention(SDPAParams(*given))


def up_to(
    queries: Float[Tensor, "B H Q D"],
    keys: Float[Tensor, "B K S D"],
    values: Float[Tensor, "B K S E"],
    last: Int[Tensor, " Q"],
    scale: float,
    softcap: float | None = None,
    bias: Float[Tensor, "B K S"] | None = None,
) -> Float[Tensor, "B H Q E"]:
    """Attend to all slots up to one per query, `last` ascending; some queries at a time."""
    batch, heads, count, width = queries.shape
    kv_heads, groups = keys.shape[1], heads // keys.shape[1]
    own = last.to(queries.device)
    out = queries.new_empty(batch, heads, count, values.shape[-1])
    for first in range(0, count, _ROWS_AT_ONCE):
        rows = slice(first, min(first + _ROWS_AT_ONCE, count))
        seen = int(last[rows.stop - 1]) + 1
        # the queries that share a KV head become one run of queries: keys are never repeated
        packed = queries[:, :, rows].reshape(batch, kv_heads, -1, width)
        mask = None
        if rows.stop - first > 1:
            slots = torch.arange(seen, device=own.device)
            mask = (slots <= own[rows, None]).repeat(groups, 1)
        if bias is not None:
            mask = _logit_bias(bias[:, :, None, :seen].to(queries.dtype), mask)
        mixed = _mix(packed, keys[:, :, :seen], values[:, :, :seen], mask, scale, softcap)
        out[:, :, rows] = mixed.view(batch, heads, -1, values.shape[-1])
    return out


def _mix(
    packed: Float[Tensor, "B K GQ D"],
    keys: Float[Tensor, "B K S D"],
    values: Float[Tensor, "B K S E"],
    mask: Bool[Tensor, "GQ S"] | Float[Tensor, "B K R S"] | None,
    scale: float,
    softcap: float | None,
) -> Float[Tensor, "B K GQ E"]:
    """Attention under a mask, or with what is added to logits.

    Torch's fused kernels have no softcap (Gemma 2).
    """
    if softcap is None:
        return F.scaled_dot_product_attention(packed, keys, values, attn_mask=mask, scale=scale)
    wide = torch.promote_types(packed.dtype, torch.float32)
    logits = softcap * torch.tanh((packed @ keys.transpose(-1, -2)).to(wide) * scale / softcap)
    if mask is not None:
        logits = (
            logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        )
    return logits.softmax(dim=-1).to(values.dtype) @ values


def _logit_bias(
    bias: Float[Tensor, "B K 1 S"], mask: Bool[Tensor, "GQ S"] | None
) -> Float[Tensor, "B K R S"]:
    """What is added to the logits: the slots' biases, and -inf where a query does not look."""
    return bias if mask is None else torch.where(mask, bias, -torch.inf)


def _newest(
    queries: Float[Tensor, "B H Q D"], keys: Float[Tensor, "B K S D"]
) -> Int[Tensor, " Q"]:
    """The slots of queries that are the newest."""
    return torch.arange(keys.shape[2] - queries.shape[2], keys.shape[2])


def ragged(
    queries: Float[Tensor, "B H Q D"],
    keys: Float[Tensor, "T D"],
    values: Float[Tensor, "T E"],
    start: Counts,
    length: Counts,
    scale: float,
    softcap: float | None = None,
    bias: Float[Tensor, " T"] | None = None,
) -> Float[Tensor, "B H Q E"]:
    """Attend to flat slots where KV heads hold different numbers of them; nothing is copied.

    Neighbouring heads that hold equally many at equal distances go in one call, others alone.
    """
    batch, heads, count, width = queries.shape
    starts, lengths = start.flatten().tolist(), length.flatten().tolist()
    if count == 1 and len(set(lengths)) == len(lengths):
        return _one_by_one(queries, keys, values, starts, lengths, scale, softcap, bias)
    per_head = queries.reshape(start.numel(), -1, count, width)
    mixed = []
    for run in _buckets(starts, lengths):
        own, k, v = per_head[run.heads], run.of(keys), run.of(values)
        b = None if bias is None else run.of(bias[:, None])[..., 0]
        if count == 1:
            mixed.append(_one_step(own[:, :, 0], k, v, scale, softcap, b)[:, :, None])
        else:
            given = own.flatten(0, 1)[None], k[None], v[None]
            mixed.append(dense(*given, scale, softcap, None if b is None else b[None])[0])
    if len(mixed) == 1:
        return mixed[0].reshape(batch, heads, count, -1)
    return torch.cat([each.flatten(0, -3) for each in mixed]).view(batch, heads, count, -1)


def _one_by_one(
    queries: Float[Tensor, "B H 1 D"],
    keys: Float[Tensor, "T D"],
    values: Float[Tensor, "T E"],
    starts: list[int],
    lengths: list[int],
    scale: float,
    softcap: float | None,
    bias: Float[Tensor, " T"] | None,
) -> Float[Tensor, "B H 1 E"]:
    """One new token, every head's run alone: as few operations as there can be."""
    batch, heads, _, width = queries.shape
    exact = softcap is None and queries.dtype in (torch.float32, torch.float64)
    per_head = (queries * scale if exact else queries).reshape(len(starts), -1, width).unbind()
    mixed = []
    for own, first, slots in zip(per_head, starts, lengths, strict=True):
        k, v = keys.narrow(0, first, slots), values.narrow(0, first, slots)
        b = None if bias is None else bias.narrow(0, first, slots)
        if exact:
            logits = torch.mm(own, k.t())
            logits = logits if b is None else logits + b
            mixed.append(torch.mm(logits.softmax(dim=-1), v))
        else:
            mixed.append(_one_step(own, k, v, scale, softcap, b))
    return torch.cat(mixed).view(batch, heads, 1, -1)


@dataclass(frozen=True)
class _Bucket:
    """Heads whose runs have one length and follow each other at one distance."""

    heads: slice
    start: int
    slots: int
    apart: int

    def of(self, buffer: Float[Tensor, "T D"]) -> Float[Tensor, "N S D"]:
        """Their slots, as a view of the buffer."""
        step, offset = buffer.stride(0), buffer.storage_offset()
        shape = self.heads.stop - self.heads.start, self.slots, buffer.shape[1]
        strides = self.apart * step, step, buffer.stride(1)
        return buffer.as_strided(shape, strides, offset + self.start * step)


def _buckets(start: list[int], length: list[int]) -> list[_Bucket]:
    """All heads in order, neighbours joined where their runs allow it."""
    found: list[_Bucket] = []
    for head, (first, slots) in enumerate(zip(start, length, strict=True)):
        last = found[-1] if found else None
        if last is not None and last.slots == slots:
            alone = last.heads.stop - last.heads.start == 1
            apart = first - start[head - 1]
            if apart > 0 and (alone or apart == last.apart):
                joined = slice(last.heads.start, head + 1)
                found[-1] = _Bucket(joined, last.start, slots, apart)
                continue
        found.append(_Bucket(slice(head, head + 1), first, slots, slots))
    return found


def _one_step(
    queries: Float[Tensor, "*N G D"],
    keys: Float[Tensor, "*N S D"],
    values: Float[Tensor, "*N S E"],
    scale: float,
    softcap: float | None,
    bias: Float[Tensor, "*N S"] | None,
) -> Float[Tensor, "*N G E"]:
    """One new token's queries: two small products beat a fused call here.

    On a CPU they are taken in float32: products of few rows in half formats are several times
    slower there than turning them round.
    """
    wide = torch.promote_types(queries.dtype, torch.float32)
    own = wide if queries.device.type == "cpu" else queries.dtype
    logits = torch.matmul(queries.to(own), keys.to(own).transpose(-1, -2)).to(wide) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias[..., None, :]
    return torch.matmul(logits.softmax(dim=-1).to(own), values.to(own)).to(values.dtype)
