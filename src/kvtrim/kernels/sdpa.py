"""Attention through torch's scaled_dot_product_attention: CPU path and fallback everywhere."""

import torch
import torch.nn.functional as F

from kvtrim.types import Bool, Counts, Float, Tensor

_LOGITS_AT_ONCE = 1 << 26  # with a softcap, queries go in blocks of at most this many logits
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
        return _capped(queries, keys, values, scale, softcap)
    grouped = queries.shape[1] != keys.shape[1]
    return F.scaled_dot_product_attention(
        queries, keys, values, is_causal=queries.shape[2] > 1, scale=scale, enable_gqa=grouped
    )


def dense(
    queries: Float[Tensor, "B H Q D"],
    keys: Float[Tensor, "B K S D"],
    values: Float[Tensor, "B K S E"],
    scale: float,
    softcap: float | None = None,
) -> Float[Tensor, "B H Q E"]:
    """Attend to S slots per KV head, the last Q of which belong to the queries."""
    batch, heads, count, width = queries.shape
    kv_heads, slots = keys.shape[1:3]
    if softcap is not None:
        return _capped(queries, keys, values, scale, softcap)
    if count == slots:
        return causal(queries, keys, values, scale)
    if count > _ROWS_AT_ONCE:
        return _in_blocks(queries, keys, values, scale)
    # the queries that share a KV head become one run of queries: keys are never repeated
    packed = queries.reshape(batch, kv_heads, heads // kv_heads * count, width)
    mask = None
    if count > 1:
        mask = lower_right(count, slots, queries.device).repeat(heads // kv_heads, 1)
    out = F.scaled_dot_product_attention(packed, keys, values, attn_mask=mask, scale=scale)
    return out.view(batch, heads, count, values.shape[-1])


def _in_blocks(
    queries: Float[Tensor, "B H Q D"],
    keys: Float[Tensor, "B K S D"],
    values: Float[Tensor, "B K S E"],
    scale: float,
) -> Float[Tensor, "B H Q E"]:
    """As `dense`, some queries at a time, over the slots that any of them sees."""
    count, slots = queries.shape[2], keys.shape[2]
    out = queries.new_empty(*queries.shape[:3], values.shape[-1])
    for first in range(0, count, _ROWS_AT_ONCE):
        rows = slice(first, min(first + _ROWS_AT_ONCE, count))
        seen = slots - count + rows.stop
        part = keys[:, :, :seen], values[:, :, :seen]
        out[:, :, rows] = dense(queries[:, :, rows], *part, scale)
    return out


def ragged(
    queries: Float[Tensor, "B H Q D"],
    keys: Float[Tensor, "T D"],
    values: Float[Tensor, "T E"],
    start: Counts,
    length: Counts,
    scale: float,
    softcap: float | None = None,
) -> Float[Tensor, "B H Q E"]:
    """Attend to flat slots where KV heads hold different numbers of them; one call per KV head."""
    batch, heads, count, width = queries.shape
    kv_heads = start.shape[1]
    per_head = queries.reshape(batch * kv_heads, heads // kv_heads, count, width).unbind()
    runs = zip(start.flatten().tolist(), length.flatten().tolist(), strict=True)
    mixed = []
    for own, (first, slots) in zip(per_head, runs, strict=True):
        k, v = keys.narrow(0, first, slots), values.narrow(0, first, slots)
        if count == 1:
            mixed.append(_one_step(own[:, 0], k, v, scale, softcap))
        else:
            mixed.append(dense(own[None], k[None, None], v[None, None], scale, softcap)[0])
    return torch.stack(mixed).view(batch, heads, count, values.shape[-1])


def _one_step(
    queries: Float[Tensor, "G D"],
    keys: Float[Tensor, "S D"],
    values: Float[Tensor, "S E"],
    scale: float,
    softcap: float | None,
) -> Float[Tensor, "G E"]:
    """One new token's queries over one KV head: two small products beat a fused call here."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    logits = torch.mm(queries, keys.t()).to(wide) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.mm(logits.softmax(dim=-1).to(values.dtype), values)


def lower_right(count: int, slots: int, device: torch.device) -> Bool[Tensor, "Q S"]:
    """Causal mask whose last row sees every slot."""
    return torch.ones(count, slots, dtype=torch.bool, device=device).tril_(slots - count)


def _capped(
    queries: Float[Tensor, "B H Q D"],
    keys: Float[Tensor, "B K S D"],
    values: Float[Tensor, "B K S E"],
    scale: float,
    softcap: float,
) -> Float[Tensor, "B H Q E"]:
    """Attention with squashed logits (Gemma 2), which torch's fused kernels do not offer."""
    batch, heads, count, width = queries.shape
    kv_heads, slots = keys.shape[1:3]
    out = queries.new_empty(batch, heads, count, values.shape[-1])
    wide = torch.promote_types(queries.dtype, torch.float32)
    block = max(1, _LOGITS_AT_ONCE // (batch * heads * slots))
    for first in range(0, count, block):
        rows = queries[:, :, first : first + block]
        packed = rows.reshape(batch, kv_heads, -1, width)
        logits = (packed @ keys.transpose(-1, -2)).to(wide) * scale
        logits = (softcap * torch.tanh(logits / softcap)).view(batch, heads, -1, slots)
        mask = lower_right(count, slots, queries.device)[first : first + block]
        weights = logits.masked_fill(~mask, -torch.inf).softmax(dim=-1).to(values.dtype)
        mixed = weights.view(batch, kv_heads, -1, slots) @ values
        out[:, :, first : first + block] = mixed.view(batch, heads, -1, values.shape[-1])
    return out
