"""What stands around a decoder: the outer modules of a model that reads images as well.

They embed the tokens and make the masks before the decoder is called, so a hook on them tells it
which tokens come and for which kind of cache the masks are. kvtrim reads text alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from kvtrim.errors import UsageError
from kvtrim.hf.attention import Mask, managing
from kvtrim.hf.cache import Cache
from kvtrim.hf.keyword import cache_in
from kvtrim.types import Tensor

_TEXT = {"input_ids", "attention_mask", "position_ids", "inputs_embeds", "cache_position"}
_TEXT |= {"labels", "logits_to_keep", "cache", "past_key_values"}
_KINDS = {"token_type_ids", "mm_token_type_ids"}  # of each token; 0 is text


def around(model: PreTrainedModel, decoder: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that the decoder of an image-text model is a part of; none in a text model."""
    if model.config.get_text_config(decoder=True) is model.config:
        return []
    inner = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return [
        module
        for module in inner
        if module is not decoder and any(part is decoder for part in module.modules())
    ]


def entered(kwargs: Mapping[str, Any]) -> None:
    """A pass goes into an outer module, all of its arguments by name.

    Raises:
        UsageError: something else than text would go into a kvtrim cache.
    """
    cache = cache_in(kwargs)
    managing.cache = isinstance(cache, Cache)
    if not isinstance(cache, Cache):
        return
    other = [name for name, given in kwargs.items() if name not in _TEXT and _says(name, given)]
    if other:
        raise UsageError(
            f"a kvtrim cache reads text alone, and {', '.join(sorted(other))} came with it; leave "
            "the images out, or give the model an ordinary cache for them"
        )
    cache.coming = kwargs.get("input_ids")


def _says(name: str, given: Any) -> bool:
    if name in _KINDS:
        return given is not None and bool(given.any())
    return (
        isinstance(given, Tensor | Mapping | Sequence)
        and not isinstance(given, str)
        and bool(len(given))
    )


def padding(mask: Any) -> Tensor | None:
    """The 2-D mask [batch, tokens] that a decoder's argument is or was made from.

    Raises:
        UsageError: it is a prepared mask of another kind.
        UnsupportedModelError: it lets tokens see later ones.
    """
    masks = list(mask.values()) if isinstance(mask, Mapping) else [mask]
    promised = [each for each in masks if isinstance(each, Mask)]
    if promised and len(promised) == len(masks):
        for each in promised:
            each.require_causal()
        return promised[0].padding
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        raise UsageError("a kvtrim cache needs the 2-D attention mask [batch, tokens] or none")
    return mask
