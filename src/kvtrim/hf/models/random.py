"""Models by the name of a configuration, with random weights: for speed, which needs no others.

`configs/` holds the published dimensions of each. Depth (`layers`) and width can be less; width is
counted in KV heads, see `config`.
"""

import json
from importlib.resources import files
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kvtrim.errors import UnknownNameError, UsageError
from kvtrim.hf.models.load import as_device, as_dtype, quiet

_FOLDER = files("kvtrim.hf.models") / "configs"
CONFIGS = tuple(
    sorted(
        file.name.removesuffix(".json")
        for file in _FOLDER.iterdir()
        if file.name.endswith(".json")
    )
)
"""Names that `build` knows."""

_SCALED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def published_config(name: str) -> dict[str, Any]:
    """The dimensions of a model as its maker published them, and `source`, its Hub id.

    Raises:
        UnknownNameError: no configuration has that name.
    """
    if name not in CONFIGS:
        raise UnknownNameError("configuration", name, CONFIGS)
    return json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def config(name: str, layers: int | None = None, width: int | float | None = None) -> Any:
    """The configuration of that name, or a smaller one in its proportions.

    Args:
        layers: decoder layers; all by default.
        width: KV heads per layer (2), or their share (0.25); rounded to whole heads, one at least.
            Query heads, hidden size and MLP size shrink in the same proportion. The size of a
            head, query heads per KV head, RoPE and vocabulary stay, so a layer's cache shrinks
            like its weights' rows and columns.

    Raises:
        UnknownNameError: no configuration has that name.
        UsageError: more layers or width than it has, or none.
    """
    dims = published_config(name)
    del dims["source"]
    if layers is not None:
        if not 1 <= layers <= dims["num_hidden_layers"]:
            raise UsageError(
                f"layers={layers}: {name} has {dims['num_hidden_layers']}; ask for 1 to that many"
            )
        dims["num_hidden_layers"] = layers
    heads = dims["num_key_value_heads"]
    taken = heads if width is None else _heads(name, width, heads)
    for each in _SCALED:
        dims[each] = dims[each] * taken // heads
    return AutoConfig.for_model(dims.pop("model_type"), **dims)


def build(
    name: str,
    *,
    layers: int | None = None,
    width: int | float | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """A model with random weights, made where it will run and in its final number format.

    Nothing is drawn twice, and no copy in another format exists on the way. Arguments as `config`
    and `load`; the same seed gives the same weights on the same device.

    Raises:
        UnknownNameError: no configuration has that name.
        UsageError: more layers or width than it has, or none.
        ModelError: an unknown device or dtype.
    """
    place = as_device(device)
    kind = as_dtype(None if dtype == "auto" else dtype, place)
    smaller = config(name, layers, width)
    with quiet():
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(smaller, dtype=kind)
        model.tie_weights()
        model.to_empty(device=place)
        model.tie_weights()
        with torch.random.fork_rng([place] if place.type == "cuda" else []):
            torch.manual_seed(seed)
            model.initialize_weights()
    return model.eval()


def _heads(name: str, width: int | float, heads: int) -> int:
    """KV heads that a width asks for."""
    share = isinstance(width, float)
    if not 0 < width <= (1 if share else heads):
        raise UsageError(
            f"width={width}: {name} has {heads} KV heads; ask for 1 to {heads} of them, or for a "
            "share above 0 and up to 1"
        )
    return max(1, round(width * heads)) if share else int(width)
