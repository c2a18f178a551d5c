"""At which layer a model's tokens are chosen, and how many of them go on."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from kvtrim.errors import UsageError
from kvtrim.types import Target

TSP = {("llama-3.1-8b", 32): 15, ("ministral-8b", 36): 17, ("mistral-nemo", 40): 19}
"""Layers after which FastKV narrows: dongwonjo/FastKV@b978769, baselines/fastkv/."""

FILTER = {
    ("llama-3.1-8b", 32): 13,
    ("mistral-nemo", 40): 19,
    ("phi-3.5-mini", 32): 19,
    ("ministral-8b", 36): 17,
}
"""Filter layers: SalesforceAIResearch/GemFilter@5f79b1a; Ministral's is FastKV's."""

SHIPPED = Path(__file__).parents[1] / "tables" / "tsp"
"""Layers that `kvtrim calibrate tsp` found, one file per model."""

Published = dict[tuple[str, int], int]


def layer_for(layer: int | None, target: Target, published: Published, last: int) -> int | None:
    """The layer to choose at: as given, measured on these very weights, or published by name.

    Args:
        last: the last layer at which choosing has an effect.

    Returns:
        None where nothing is known of the model: the middle.

    Raises:
        UsageError: the model has no such layer.
    """
    if layer is None and published is TSP:
        found = measured_layers().get(target.identity() if measured_layers() else None)
        layer = None if found is None else found["layer"]
    if layer is not None:
        if last < 0:
            raise UsageError(f"{target.name} has one layer: there is none above it to spare")
        if not 0 <= layer <= last:
            raise UsageError(
                f"layer={layer}: {target.name} has {target.layers} layers, so the choice is made "
                f"at one of 0 to {last}"
            )
        return layer
    for (name, layers), number in published.items():
        if name in target.name.lower() and layers == target.layers:
            return number
    return None


def middle(layer: int | None, layers: int) -> int:
    """The layer given, or else the last one of the lower half."""
    return max(0, layers // 2 - 1) if layer is None else layer


@lru_cache(maxsize=1)
def measured_layers() -> dict[str | None, dict[str, Any]]:
    """What was measured on models, by the fingerprint of their weights."""
    tables = [json.loads(path.read_text()) for path in sorted(SHIPPED.glob("*.json"))]
    return {table["identity"]: table for table in tables}


def amount(asked: int | float, tokens: int) -> int:
    """A number of tokens, or a share of so many; one at least."""
    return asked if isinstance(asked, int) else max(1, int(tokens * asked + 1e-9))
