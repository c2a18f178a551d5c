"""What entries become behind the output projection W_O, for policies that weigh them by it."""

import torch

from kvtrim.errors import UsageError
from kvtrim.methods.policies import ops
from kvtrim.types import Float, LayerView, Tensor

_SLOTS_AT_ONCE = 256  # bounds the products with W_O that exist at once


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
    return ops.length_of(values @ factor.transpose(-1, -2))


def projected_norms_l1(layer: LayerView, slots: int) -> Float[Tensor, "B K N"]:
    """L1 norm of the first slots' values after the output projection, mean over the KV group.

    No factor stands for W_O here; one head's product at a time, in blocks of slots.
    """
    kv_heads = layer.values.shape[1]
    weights = output(layer).float().unflatten(0, (kv_heads, -1))  # [K, G, E, M]
    values = layer.values[:, :, :slots].float()
    total = values.new_zeros(values.shape[:3])
    for first in range(0, slots, _SLOTS_AT_ONCE):
        part = slice(first, first + _SLOTS_AT_ONCE)
        for one in weights.unbind(1):
            total[:, :, part] += (values[:, :, part] @ one).abs_().sum(dim=-1)
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


def output_norm(layer: LayerView, window: int) -> Float[Tensor, "B 1 1"]:
    """Frobenius norm of the window's projected attention output."""
    weights = ops.attention(layer, last=window)
    values = layer.values.float().repeat_interleave(weights.shape[1] // layer.keys.shape[1], 1)
    mixed = torch.einsum("bhws,bhse,hem->bwm", weights, values, output(layer).float())
    return mixed.norm(dim=(1, 2))[:, None, None]
