"""Decode attention over a ragged store through torch's own FlashAttention, CUDA halves only.

Every KV head counts as a sequence of its own whose "heads" are the query heads of its group;
`seqused_k` gives its length, so slack between the runs costs nothing. See
https://docs.pytorch.org/docs/stable/nn.attention.varlen.html.
"""

import inspect

import torch
from torch.nn.attention import varlen

from kvtrim.errors import UsageError
from kvtrim.types import Counts, Float, Tensor

_PUBLIC = "seqused_k" in inspect.signature(varlen.varlen_attn).parameters  # since torch 2.12


def ragged(
    queries: Float[Tensor, "B H Q D"],
    keys: Float[Tensor, "T D"],
    values: Float[Tensor, "T E"],
    start: Counts,
    length: Counts,
    scale: float,
    softcap: float | None = None,
) -> Float[Tensor, "B H Q E"]:
    """Attend to flat slots; arguments as `kernels.split.ragged`, start and length on the CPU.

    Raises:
        UsageError: not on CUDA, another number format than fp16 or bf16, logits that are capped,
            or values of another width than keys: FlashAttention does none of these.
    """
    _require(queries, keys, values, softcap)
    rows, heads, count, width = queries.shape
    runs, device = start.numel(), queries.device
    packed = queries.view(rows, start.shape[1], -1, count, width).transpose(2, 3)
    packed = packed.reshape(runs * count, -1, width)  # [runs * Q, G, D]
    first = torch.arange(0, (runs + 1) * count, count, dtype=torch.int32, device=device)
    ends = torch.cat([start.flatten(), torch.tensor([keys.shape[0]])]).int().to(device)
    held = length.flatten().int().to(device)
    longest = int(length.max())
    mixed = _attend(packed, keys, values, first, ends, count, longest, held, scale)
    mixed = mixed.view(rows, start.shape[1], count, -1, width).transpose(2, 3)
    mixed = mixed.reshape(rows, heads, count, width)
    seen = length[..., None] - count + 1 + torch.arange(count) > 0
    seen = seen.repeat_interleave(heads // start.shape[1], dim=1)[..., None]
    return mixed if bool(seen.all()) else mixed.masked_fill(~seen.to(device), 0)


def _attend(
    packed: Float[Tensor, "N G D"],
    keys: Float[Tensor, "T D"],
    values: Float[Tensor, "T D"],
    first: Tensor,
    ends: Tensor,
    count: int,
    longest: int,
    held: Tensor,
    scale: float,
) -> Float[Tensor, "N G D"]:
    """Torch's public function where it takes lengths, else what that function calls."""
    keys, values = keys[:, None], values[:, None]
    if _PUBLIC:
        options = {"window_size": (-1, 0), "seqused_k": held, "enable_gqa": True, "scale": scale}
        found = varlen.varlen_attn(packed, keys, values, first, ends, count, longest, **options)
        return found if isinstance(found, torch.Tensor) else found[0]
    return torch.ops.aten._flash_attention_forward(
        packed, keys, values, first, ends, count, longest, 0.0, True, False,
        scale=scale, seqused_k=held,
    )[0]  # fmt: skip


def _require(queries: Tensor, keys: Tensor, values: Tensor, softcap: float | None) -> None:
    halves = (torch.float16, torch.bfloat16)
    if queries.device.type != "cuda" or queries.dtype not in halves:
        kind = str(queries.dtype).removeprefix("torch.")
        raise UsageError(
            f"impl='varlen' is torch's FlashAttention: fp16 or bf16 on CUDA, not {kind} on "
            f"{queries.device.type}; use impl='sdpa'"
        )
    if softcap is not None or keys.shape[-1] != values.shape[-1]:
        raise UsageError(
            "impl='varlen' knows neither capped logits nor values of another width than keys; "
            "use impl='triton' or impl='sdpa'"
        )
