"""Settings that make every method of the registry evict from the short prompts of the tests."""

import json
import tempfile
from functools import cache
from pathlib import Path

import torch

from kvtrim.methods import echo_tables
from kvtrim.methods.echo_tables import EchoTable
from kvtrim.methods.settings import find, parameters

WINDOW = 8


def small(name, layers=3, heads=6, alike=0):
    """Settings for tiny models; layers and heads as kvtrim manages them.

    With `alike` that many KV heads are given the same table of head scores.
    """
    known = parameters(find(name))
    windows = [full for full in known if full.endswith(".window")]
    # echo without a window is another method than echo-window
    settings = {"window": WINDOW} if windows and name != "echo" else {}
    if "propagation.scorer" in known:
        settings |= {"tokens": 32}
    if "propagation.decay" in known:  # few layers cannot reach a budget: they pass on what is left
        settings |= {"decay": 0.2, "min_context": 4}
    return settings | table(name, layers, heads, alike)


def table(name, layers=3, heads=6, alike=0):
    """A table of head scores, or of echo's maps, for methods that need one."""
    if "policy.table" in parameters(find(name)):
        return {"table": str(_maps(layers, alike))}
    if "budget.table" not in parameters(find(name)):
        return {}
    return {"table": str(_written(layers, heads, heads // alike if alike else heads))}


@cache
def _maps(layers, alike, kv_heads=2, width=48):
    draw = torch.Generator().manual_seed(layers)
    weight = torch.randn(layers, 1 if alike else kv_heads, width, generator=draw) / 8
    bias = torch.randn(layers, 1 if alike else kv_heads, generator=draw)
    table = EchoTable(weight.expand(-1, kv_heads, -1), bias.expand(-1, kv_heads))
    path = Path(tempfile.mkdtemp(prefix="kvtrim-test-")) / f"{layers}-{alike}.safetensors"
    echo_tables.write(path, table, {})
    return path


@cache
def _written(layers, heads, period):
    scores = {
        f"{layer}-{head}": [1 + (5 * layer + 3 * (head % period)) % 7, (layer + head % period) % 3]
        for layer in range(layers)
        for head in range(heads)
    }
    path = Path(tempfile.mkdtemp(prefix="kvtrim-test-")) / f"{layers}x{heads}-{period}.json"
    path.write_text(json.dumps(scores))
    return path
