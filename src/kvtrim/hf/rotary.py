"""Turning keys to other positions with the frequencies of the model's own rotary embedding."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from kvtrim.errors import UnsupportedModelError
from kvtrim.hf.models.architectures import SUPPORTED, layout
from kvtrim.types import Float, Int, Tensor

_OTHERWISE = ("cohere", "cohere2", "exaone4", "glm", "glm4", "smollm3")
"""Turn neighbouring dimensions (2 i, 2 i + 1), or nothing in some of their layers."""

_TURNED = tuple(kind for kind in SUPPORTED if kind not in _OTHERWISE)
_CHANGING = ("dynamic", "longrope")  # kinds of RoPE whose frequencies depend on the length so far


@dataclass(frozen=True)
class Rotation:
    """The rotary embedding of one layer: pairs (i, i + F) of the first 2 F dimensions turn."""

    module: torch.nn.Module
    name: str  # of the buffer that holds the F frequencies

    def __call__(self, keys: Float[Tensor, "N D"], by: Int[Tensor, " N"]) -> Float[Tensor, "N D"]:
        """Keys at some positions, turned on to positions that are `by` greater."""
        frequencies = getattr(self.module, self.name).to(keys.device)
        wide = torch.promote_types(torch.promote_types(frequencies.dtype, keys.dtype), torch.float)
        angles = by[:, None].to(wide) * frequencies.to(wide)
        cos, sin, half = angles.cos(), angles.sin(), frequencies.shape[0]
        a, b, rest = keys.to(wide).split([half, half, keys.shape[-1] - 2 * half], dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(keys.dtype)


def rotations(model: PreTrainedModel) -> list[Rotation]:
    """The rotation of every layer that kvtrim manages.

    Raises:
        UnsupportedModelError: an architecture on which this was not tested, or a rotary embedding
            whose frequencies change with the length of the input.
    """
    config = model.config.get_text_config(decoder=True)
    plan = layout(model, allow_untested=True)
    rotary: Any = getattr(plan.decoder, "rotary_emb", None)
    if config.model_type not in _TURNED or rotary is None:
        raise UnsupportedModelError(
            f"turning keys or queries (positions='rolled', a refit, expected-attention) is tested "
            f"on {', '.join(_TURNED)}, not on {config.model_type!r}; use positions='original' "
            "(preset=bounded), refit=none, another method"
        )
    return [_rotation(rotary, config, layer) for layer in plan.managed]


def switch(model: PreTrainedModel) -> int | None:
    """The length above which a model with long RoPE turns everything by other frequencies."""
    config = model.config.get_text_config(decoder=True)
    given = getattr(config, "rope_parameters", None) or {}
    kinds = [given, *(each for each in given.values() if isinstance(each, dict))]
    long = [kind for kind in kinds if kind.get("rope_type") == "longrope"]
    return min((int(kind["original_max_position_embeddings"]) for kind in long), default=None)


def changes_with_length(model: PreTrainedModel) -> bool:
    """Whether the rotary frequencies depend on how long the input is by now."""
    rotary: Any = getattr(layout(model, allow_untested=True).decoder, "rotary_emb", None)
    kind = getattr(rotary, "rope_type", None)
    return any(each in _CHANGING for each in (kind.values() if isinstance(kind, dict) else [kind]))


def _rotation(rotary: Any, config: Any, layer: int) -> Rotation:
    """One layer's; Gemma 3 keeps one set of frequencies per type of layer."""
    kind, name = rotary.rope_type, "inv_freq"
    if isinstance(kind, dict):
        layer_type = config.layer_types[layer]
        kind, name = kind.get(layer_type), f"{layer_type}_inv_freq"
    if kind is None or kind in _CHANGING:
        raise UnsupportedModelError(
            "turning keys or queries (positions='rolled', a refit, expected-attention) needs "
            f"fixed rotary frequencies; layer {layer} of this {config.model_type} model has RoPE "
            f"of type {kind!r}; use positions='original' (preset=bounded), refit=none, another "
            "method"
        )
    return Rotation(rotary, name)
