"""The model's own rotary embedding: turning keys on by it, and lengths at which it changes.

Models with long RoPE (Phi-3) turn keys by other frequencies above a length. Keys that were turned
by one set do not go with queries turned by the other, and Phi-3's own `generate` throws its cache
away at that length and reads everything again. So a cache stays on one side.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from kvtrim.errors import CacheError, UnsupportedModelError
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
            f"turning keys or queries (positions='rolled', a refit, expected-attention, echo) is "
            f"tested on {', '.join(_TURNED)}, not on {config.model_type!r}; use "
            "positions='original' (preset=bounded), refit=none, asked=0 (echo), another method"
        )
    return [_rotation(rotary, config, layer) for layer in plan.managed]


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
            "turning keys or queries (positions='rolled', a refit, expected-attention, echo) "
            f"needs fixed rotary frequencies; layer {layer} of this {config.model_type} model has "
            f"RoPE of type {kind!r}; use positions='original' (preset=bounded), refit=none, "
            "asked=0 (echo), another method"
        )
    return Rotation(rotary, name)


@dataclass
class LongRope:
    """On which side of the length at which frequencies change a cache was read."""

    switch: int | None  # that length; None where there is none
    beyond: bool | None = None  # None: nobody has said, as of a file or of several caches joined

    @classmethod
    def of(cls, model: PreTrainedModel) -> "LongRope":
        """A cache of this model that has read nothing."""
        config = model.config.get_text_config(decoder=True)
        given = getattr(config, "rope_parameters", None) or {}
        kinds = [given, *(each for each in given.values() if isinstance(each, dict))]
        long = [kind for kind in kinds if kind.get("rope_type") == "longrope"]
        return cls(
            min((int(kind["original_max_position_embeddings"]) for kind in long), default=None)
        )

    def enter(self, ends: list[int], read: list[int]) -> None:
        """New tokens are coming that end at these positions; remembers their side.

        Args:
            read: where the tokens end that each prompt has read; empty if none were.

        Raises:
            CacheError: what is held was turned by the other frequencies.
        """
        if self.switch is not None:
            if read:
                self._require_one_side(self._was_beyond(max(ends), read), max(ends))
            self.beyond = max(ends) > self.switch

    def require_reach(self, first: int, end: int, read: list[int]) -> None:
        """Refuse in advance what would begin with `first` tokens and go on to position `end`.

        Raises:
            CacheError: the frequencies would change on the way.
        """
        if self.switch is not None:
            beyond = self._was_beyond(end, read) if read else first > self.switch
            self._require_one_side(beyond, end)

    def require_below(self, read: list[int]) -> None:
        """Refuse what was read beyond the switch, where others that were not are to go along.

        Raises:
            CacheError: it was.
        """
        if self.switch is not None and self._was_beyond(max(read), read):
            raise CacheError(
                f"this model turns keys by other rotary frequencies above {self.switch:,} tokens, "
                f"and this was read beyond that ({max(read):,} tokens), so that it cannot "
                "share passes with others; use kvtrim.generate, or read a shorter part"
            )

    def _was_beyond(self, end: int, read: list[int]) -> bool:
        """Whether what is held was turned as beyond the switch."""
        if self.beyond is not None or self.switch is None:
            return bool(self.beyond)
        sides = {at > self.switch for at in read}
        return sides.pop() if len(sides) == 1 else not end > self.switch

    def _require_one_side(self, beyond: bool, end: int) -> None:
        switch = self.switch or 0
        if (end > switch) != beyond:
            held, coming = ("beyond", "below") if beyond else ("below", "beyond")
            raise CacheError(
                f"this model turns keys by other rotary frequencies from {switch:,} tokens on, "
                f"and tokens {coming} that (up to {end:,}) do not go with a cache read {held} it; "
                f"read everything in one pass of more than {switch:,} tokens (context and "
                "question together), or stay below with a shorter context or fewer new tokens"
            )
