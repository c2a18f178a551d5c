"""Attention of a probe on a CPU: what slots received comes out of the same products.

Fused attention hides its weights, and asking for them again would be a second product. So only
the slots that are asked about go through weights that are made, in blocks that a processor's
caches hold; all others go through torch's fused kernel. Log-sum-exps join the parts.
"""

from collections.abc import Iterator

import torch

from kvtrim.kernels.parts import Part, attend_by_torch, join_parts
from kvtrim.types import Float, Noted, Tensor

_ELEMENTS = 2**18
"""Weights in a block, for each thread: 1 MiB in fp32."""


def largest(
    queries: Float[Tensor, "B H Q D"],
    keys: Float[Tensor, "B K S D"],
    values: Float[Tensor, "B K S E"],
    noted: Noted,
    scale: float,
    softcap: float | None = None,
) -> tuple[Float[Tensor, "B H Q E"], Float[Tensor, "B H N"]]:
    """Attend to S slots, the last Q of which are the queries' own; note the largest weights.

    What is noted is a softmax over some slots and the own ones, as if nothing else were held.

    Returns:
        The output of attention over all slots, and the largest weight of each of those some.
    """
    before, given = keys.shape[2] - queries.shape[2], (scale, softcap)
    others = torch.ones(before, dtype=torch.bool)
    others[noted.slots] = False
    own = _attend(queries, keys[:, :, before:], values[:, :, before:], *given, causal=True)
    part = keys[:, :, noted.slots], values[:, :, noted.slots]
    asked, most = _attend_and_note(queries, *part, own[1], noted.weights, *given)
    parts = [own, asked]
    if bool(others.any()):
        rest = others.nonzero()[:, 0]
        parts.append(_attend(queries, keys[:, :, rest], values[:, :, rest], *given))
    return join_parts(parts), most


def _attend(
    queries: Float[Tensor, "B H Q D"],
    keys: Float[Tensor, "B K S D"],
    values: Float[Tensor, "B K S E"],
    scale: float,
    softcap: float | None,
    causal: bool = False,
) -> Part:
    """Attention over some of the slots: all of them, or those up to each query's own."""
    part = None if softcap is not None else attend_by_torch(queries, keys, values, scale, causal)
    if part is not None:
        return part
    out, lse = _blank(queries, values)
    for at, _, weights, part, held in _blocks(queries, keys, values, scale, softcap, causal):
        out[at], lse[at] = (weights @ held).view_as(out[at]), part
    return out, lse


def _attend_and_note(
    queries: Float[Tensor, "B H Q D"],
    keys: Float[Tensor, "B K S D"],
    values: Float[Tensor, "B K S E"],
    own: Float[Tensor, "B H Q"],
    weighed: Float[Tensor, "B Q"] | None,
    scale: float,
    softcap: float | None,
) -> tuple[Part, Float[Tensor, "B H S"]]:
    """Attention over some slots, and the largest weights beside `own`, others' log-sum-exps."""
    out, lse = _blank(queries, values)
    most = lse.new_zeros(*queries.shape[:2], keys.shape[2])
    for at, shape, weights, part, held in _blocks(queries, keys, values, scale, softcap):
        out[at], lse[at] = (weights @ held).view_as(out[at]), part
        shares = (part - torch.logaddexp(part, own[at].to(part.dtype))).exp()
        if weighed is not None:
            shares *= weighed[at[0], at[2]]
        seen = weights.mul_(shares.view(-1, 1)).view(shape).amax(dim=1)
        torch.maximum(most[at[:2]], seen, out=most[at[:2]])
    return (out, lse), most


def _blank(queries: Float[Tensor, "B H Q D"], values: Float[Tensor, "B K S E"]) -> Part:
    wide = torch.promote_types(queries.dtype, torch.float32)
    out = torch.empty(*queries.shape[:3], values.shape[-1], dtype=wide)
    return out, out.new_empty(queries.shape[:3])


def _blocks(
    queries: Float[Tensor, "B H Q D"],
    keys: Float[Tensor, "B K S D"],
    values: Float[Tensor, "B K S E"],
    scale: float,
    softcap: float | None,
    causal: bool = False,
) -> Iterator[tuple[tuple[int, slice, slice], tuple[int, int, int], Tensor, Tensor, Tensor]]:
    """Weights of some queries of one KV head's group at a time, good until the next.

    Where they belong (prompt, query heads, queries), their shape [G, W, S], the weights
    [G * W, S], their log-sum-exp [G, W] and the head's values [S, E].
    """
    rows, heads, count, width = queries.shape
    kv_heads, slots = keys.shape[1:3]
    group, wide = heads // kv_heads, torch.promote_types(queries.dtype, torch.float32)
    step = min(count, rows_at_once(group, slots))
    room = torch.empty(2, group * step * slots, dtype=wide)  # the same for every block
    for row in range(rows):
        for head in range(kv_heads):
            own = slice(head * group, (head + 1) * group)
            packed = queries[row, own].to(wide) * scale
            turned = keys[row, head].to(wide).t().contiguous()
            held = values[row, head].to(wide)
            for first in range(0, count, step):
                part = slice(first, min(first + step, count))
                shape = group, part.stop - first, slots
                size = group * shape[1]
                logits, weights = room[:, : size * slots].view(2, size, slots)
                torch.mm(packed[:, part].reshape(size, width), turned, out=logits)
                if softcap is not None:
                    logits.div_(softcap).tanh_().mul_(softcap)
                if causal:
                    ahead = torch.arange(slots) > torch.arange(slots - count, slots)[part, None]
                    logits.view(shape).masked_fill_(ahead, -torch.inf)
                torch.softmax(logits, dim=-1, out=weights)
                # the largest logit and its weight tell the sum without another exponential
                lse = logits.amax(dim=-1) - weights.amax(dim=-1).log()
                yield (row, own, part), shape, weights, lse.view(shape[:2]), held


def rows_at_once(heads: int, slots: int) -> int:
    """Queries of so many heads whose weights over so many slots make a block."""
    return max(16, _ELEMENTS * torch.get_num_threads() // max(1, heads * slots))
