"""Attention over some of the slots at a time: log-sum-exps join the parts."""

from collections.abc import Callable, Sequence

import torch

from kvtrim.types import Bool, Float, Int, Tensor

_ROWS_AT_ONCE = 256  # queries whose weights are there at once, where they are spelled out

Part = tuple[Float[Tensor, "B H Q E"], Float[Tensor, "B H Q"]]
"""Output of attention over some of the slots, and its log-sum-exp."""


def attend_part(
    queries: Float[Tensor, "B H Q D"],
    keys: Float[Tensor, "B K S D"],
    values: Float[Tensor, "B K S E"],
    scale: float,
    softcap: float | None = None,
    bias: Float[Tensor, "B K S"] | None = None,
    causal: bool = False,
    window: int | None = None,
) -> Part:
    """Attention over these slots, of which there is one at least.

    Args:
        bias: added to the logits of each slot.
        causal: the last Q slots are the queries' own; else every query sees every slot.
        window: where they are, a query sees so many slots at most, its own included.
    """
    if window is not None:
        most = queries.shape[2] + window - 1
        keys, values = keys[:, :, -most:], values[:, :, -most:]
        bias = None if bias is None else bias[:, :, -most:]
        window = window if keys.shape[2] > window else None
    if softcap is None and window is None:
        part = attend_by_torch(queries, keys, values, scale, causal, bias)
        if part is not None:
            return part

    def attend(part: slice) -> Part:
        own, seen = queries[:, :, part], slice(None)
        if causal:
            end = keys.shape[2] - queries.shape[2] + part.start + own.shape[2]
            seen = slice(max(0, end - own.shape[2] - window + 1) if window else 0, end)
        given = keys[:, :, seen], values[:, :, seen], None if bias is None else bias[:, :, seen]
        hidden = _out_of_sight(own, given[0], window) if causal else None
        return _explicit(own, *given, scale, softcap, hidden)

    return _in_blocks(queries.shape[2], attend)


def attend_last(
    queries: Float[Tensor, "B H Q D"],
    keys: Float[Tensor, "B K S D"],
    values: Float[Tensor, "B K S E"],
    scale: float,
    softcap: float | None,
    counts: Int[Tensor, " Q"],
) -> Part:
    """Attention of each query over the last so many slots, of which there is one at least."""
    slots = keys.shape[2]
    if int(counts.min()) >= slots:
        return attend_part(queries, keys, values, scale, softcap)
    first = slots - counts.to(keys.device)[:, None]

    def attend(part: slice) -> Part:
        hidden = torch.arange(slots, device=keys.device) < first[part]
        return _explicit(queries[:, :, part], keys, values, None, scale, softcap, hidden)

    return _in_blocks(queries.shape[2], attend)


def _in_blocks(count: int, attend: Callable[[slice], Part]) -> Part:
    """So many queries, a block of them at a time, since their weights are spelled out."""
    starts = range(0, count, _ROWS_AT_ONCE)
    parts = [attend(slice(first, first + _ROWS_AT_ONCE)) for first in starts]
    out, lse = (torch.cat(side, dim=2) for side in zip(*parts, strict=True))
    return out, lse


def attend_by_torch(
    queries: Float[Tensor, "B H Q D"],
    keys: Float[Tensor, "B K S D"],
    values: Float[Tensor, "B K S E"],
    scale: float,
    causal: bool = False,
    bias: Float[Tensor, "B K S"] | None = None,
) -> Part | None:
    """As `attend_part`, by torch's kernel for CPUs; None where that cannot."""
    kernel = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    if kernel is None or queries.is_cuda or keys.shape[-1] != values.shape[-1]:
        return None
    if not causal or queries.shape[2] == 1:
        wide = torch.promote_types(queries.dtype, torch.float32)
        added = None if bias is None else bias[:, :, None].to(wide)
        given = _fold(queries, keys), keys, values, 0.0, False
        out, lse = kernel(*given, attn_mask=added, scale=scale)[:2]
        return _unfold(out, queries), _unfold(lse, queries)
    if bias is not None or queries.shape[2] != keys.shape[2]:
        return None  # it counts a query's slots from the first
    group = queries.shape[1] // keys.shape[1]
    repeated = (each.repeat_interleave(group, dim=1) for each in (keys, values))
    return kernel(queries, *repeated, 0.0, True, scale=scale)[:2]


def join_parts(parts: Sequence[Part]) -> Float[Tensor, "B H Q E"]:
    """Attention over all slots from that over parts of them.

    Args:
        parts: every query found a slot in the first; where it found none in another one, that
            one's output is finite and its log-sum-exp -inf.
    """
    out, total = parts[0]
    dtype = out.dtype
    for other, lse in parts[1:]:
        share = torch.sigmoid(lse - total)[..., None]
        out = torch.lerp(out.to(share.dtype), other.to(share.dtype), share)
        total = torch.logaddexp(total, lse)
    return out.to(dtype)


def _explicit(
    queries: Float[Tensor, "B H Q D"],
    keys: Float[Tensor, "B K S D"],
    values: Float[Tensor, "B K S E"],
    bias: Float[Tensor, "B K S"] | None,
    scale: float,
    softcap: float | None,
    hidden: Bool[Tensor, "Q S"] | None,
) -> Part:
    wide = torch.promote_types(queries.dtype, torch.float32)
    logits = _fold(queries, keys).to(wide) @ keys.to(wide).transpose(-1, -2) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias[:, :, None].to(wide)
    if hidden is not None:
        groups = queries.shape[1] // keys.shape[1]
        logits = logits.masked_fill(hidden.repeat(groups, 1), -torch.inf)
    lse = logits.logsumexp(dim=-1)
    out = (logits - lse[..., None]).exp() @ values.to(wide)
    return _unfold(out, queries), _unfold(lse, queries)


def _out_of_sight(
    queries: Float[Tensor, "B H Q D"], keys: Float[Tensor, "B K S D"], window: int | None
) -> Bool[Tensor, "Q S"]:
    """Slots behind each query's own, which are the last, and those before its window."""
    count, slots = queries.shape[2], keys.shape[2]
    ends = torch.arange(slots - count, slots, device=keys.device)[:, None]
    places = torch.arange(slots, device=keys.device)
    return places > ends if window is None else (places > ends) | (places <= ends - window)


def _fold(
    queries: Float[Tensor, "B H Q D"], keys: Float[Tensor, "B K S D"]
) -> Float[Tensor, "B K GQ D"]:
    """The queries that share a KV head as one run of queries: keys are never repeated."""
    return queries.reshape(queries.shape[0], keys.shape[1], -1, queries.shape[-1])


def _unfold(out: Float[Tensor, "B K GQ *E"], queries: Float[Tensor, "B H Q D"]) -> Tensor:
    return out.reshape(*queries.shape[:3], *out.shape[3:])
