"""The slow oracle, attention over a ragged store in plain loops; every fast path is tested on it.

Optimised implementations must not import from here.
"""

import torch

from kvtrim.types import Counts, Float, Tensor


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
    """Attend to T flat slots, of which KV head (b, h) owns `length[b, h]` from `start[b, h]`.

    The last Q slots of a head belong to the Q queries, and query i sees nothing behind its own.
    `bias` is added to the logits of each slot. Computed in float64; a query that sees nothing
    gets zeros.
    """
    batch, heads, count, _ = queries.shape
    kv_heads = start.shape[1]
    out = queries.new_zeros(batch, heads, count, values.shape[-1])
    for b in range(batch):
        for h in range(heads):
            group = h // (heads // kv_heads)
            first, slots = int(start[b, group]), int(length[b, group])
            for i in range(count):
                seen = slots - (count - 1 - i)
                if seen <= 0:
                    continue
                run = slice(first, first + seen)
                logits = keys[run].double() @ queries[b, h, i].double() * scale
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                if bias is not None:
                    logits = logits + bias[run].double()
                out[b, h, i] = (logits.softmax(dim=0) @ values[run].double()).to(out.dtype)
    return out
