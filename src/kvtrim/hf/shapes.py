"""Which tensors, of which shapes, a saved cache of a model may hold: known before one is read."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PretrainedConfig

from kvtrim.hf.models.architectures import head_width
from kvtrim.methods.method import Method

Shape = tuple[int, ...]
Shapes = Mapping[str, tuple[torch.dtype, Shape]]


@dataclass(frozen=True)
class Kind:
    """What the caches of a model and a method have in common."""

    config: PretrainedConfig
    method: Method
    managed: int  # layers that kvtrim holds
    sliding: int  # and those that slide


def strange(kind: Kind, shapes: Shapes, session: Mapping[str, Any]) -> str | None:
    """The first tensor that no cache of this model and method has, and its shape.

    Args:
        kind: of the cache that the file is meant for.
        shapes: type and shape of every tensor of the file.
        session: what the file says of the session.
    """
    lengths, seen = session.get("lengths"), session.get("seen")
    if not isinstance(lengths, list) or not all(type(one) is int for one in (*lengths, seen)):
        return "prompts without lengths"
    known = _known_shapes(kind, lengths, cast(int, seen))
    for name, (number, shape) in shapes.items():
        fits = next((fits for what, fits in known.items() if re.fullmatch(what, name)), None)
        if fits is None or not fits(number, shape):
            return f"{name} of shape {list(shape)}"
    return None


def _known_shapes(
    of: Kind, lengths: list[int], seen: int
) -> dict[str, Callable[[torch.dtype, Shape], bool]]:
    config = cast(Any, of.config).get_text_config(decoder=True)
    queries, shared, rows = config.num_attention_heads, config.num_key_value_heads, len(lengths)
    heads = queries if of.method.granularity == "query" else shared
    most = sum(lengths) * heads
    names = ("qk_head_dim", "v_head_dim")  # where keys and values are of another width
    widths = {head_width(config), *(getattr(config, name, None) for name in names)}

    def dense(count: int) -> Callable[[torch.dtype, Shape], bool]:
        return lambda kind, shape: (
            kind.is_floating_point
            and len(shape) == 4
            and shape[:2] == (rows, count)
            and shape[2] <= seen
            and shape[3] in widths
        )

    layer = rf"({'|'.join(str(index) for index in range(of.managed))})"
    slides = rf"({'|'.join(str(index) for index in range(of.sliding))})"
    return {
        "real|token_ids": lambda _, shape: len(shape) == 2 and shape[0] == rows,
        rf"layers\.{layer}\.length|share\.{layer}": lambda _, shape: shape == (rows, heads),
        rf"layers\.{layer}\.(keys|values)": lambda kind, shape: (
            kind.is_floating_point and len(shape) == 2 and shape[0] <= most and shape[1] in widths
        ),
        rf"layers\.{layer}\.\w+": lambda _, shape: len(shape) == 1 and shape[0] <= most,
        rf"queries\.{layer}": dense(queries),
        rf"references\.{layer}\.[0-9]+": lambda kind, shape: (
            kind.is_floating_point
            and len(shape) == 3
            and shape[0] == queries
            and shape[1] <= seen
            and shape[2] in widths
        ),
        rf"hidden\.{layer}": lambda kind, shape: (
            kind.is_floating_point
            and len(shape) == 3
            and shape[0] == rows
            and shape[1] <= seen
            and shape[2] == config.hidden_size
        ),
        rf"sliding\.{slides}\.(keys|values)": dense(shared),
    }
