"""The presets of `METHODS` that are long, and settings that several of them share."""

from collections.abc import Mapping
from typing import Any

Presets = Mapping[str, Mapping[str, Any]]

KVPRESS_WINDOW: Mapping[str, Any] = {
    "window": 64,
    "kernel": 5,
    "pool": "avg",
    "rows": "mean",
    "group_order": "after",
}
KVF_WINDOW: Mapping[str, Any] = {"window": 8, "kernel": 7, "pool": "max"}
UPSTREAM_DEFENSIVE: Mapping[str, Any] = {"among": "heads", "own": "before"}
CURDKV_PRESETS: Presets = {
    "paper": {},
    "authors": {"project": None, "local_window": 16, "padding": "front"},
    "kvpress": {"project": None, "local_window": 16, "padding": "tail"},
}
CAKE_TAUS = {  # tau1, tau2
    "llama-3.1-8b-1024": (1.6, 0.4),
    "llama-3.1-8b-128": (1.6, 0.6),
    "mistral-7b-v0.3-1024": (0.8, 0.5),
    "mistral-7b-v0.3-128": (1.0, 0.8),
    "qwen2.5-7b-1024": (1.5, 0.6),
    "qwen2.5-7b-128": (0.4, 0.6),
    "llama-2-7b-1024": (1.9, 1.8),
    "llama-2-7b-128": (0.9, 2.3),
    "llama-2-13b-1024": (0.5, 0.4),
    "llama-2-13b-128": (1.8, 2.0),
}
CAKE_PRESETS: Presets = {
    name: {"tau1": one, "tau2": two} for name, (one, two) in CAKE_TAUS.items()
}

SNAPKV_PRESETS: Presets = {
    "upstream": {"granularity": "query"},
    "kvf": {**KVF_WINDOW, "granularity": "query"},
    "kvf-kv": KVF_WINDOW,
    "fastkv-v1": {**KVF_WINDOW, "pool": "avg", "granularity": "query"},
    "fastkv-head": {**KVF_WINDOW, "granularity": "query"},
    "kvpress": KVPRESS_WINDOW,
}

H2O_PRESETS: Presets = {
    "upstream-ratio": {"granularity": "query"},
    "upstream-stream": {"heavy": 48, "positions": "rolled", "granularity": "query"},
    "prefill": {"window": 8, "every": None},
    "kvf": {"window": 8, "every": None, "granularity": "query"},
    "fastkv": {"window": 8, "every": None, "granularity": "query"},
    "observed": {"window": 0, "every": None, "per_query": True},
}

ADAKV_PRESETS: Presets = {
    "upstream": {"floor": 0.5, "granularity": "query"},
    "upstream-gqa": {"floor": 0.2},
    "kvf": {**KVF_WINDOW, "normalize": True, "granularity": "query"},
    "kvf-kv": {**KVF_WINDOW, "normalize": True},
    "fastkv-v1": {**KVF_WINDOW, "pool": "avg", "granularity": "query"},
    "kvpress": {**KVPRESS_WINDOW, "rule": "floor"},
}

HEADKV_PRESETS: Presets = {
    "upstream": {"beta": 1.01, "granularity": "query"},
    "fastkv-v1": {"pool": "avg", "granularity": "query"},
    "kvf": {"beta": 1.01, "window_inside": False, "granularity": "query"},
    "kvf-kv": {"beta": 1.01, "window_inside": False},
}

CASCADE_PRESETS: Presets = {
    "upstream": {"recent": 0.2, "decay": 0.9},
    "upstream-13b": {"recent": 0.2, "decay": 0.8, "interval": 2},
    "upstream-70b": {"recent": 0.2, "decay": 0.9, "interval": 3},
    "fastkv-35": {"recent": 0.01, "decay": 0.01},
    "fastkv-50": {"recent": 0.2, "decay": 0.3},
    "fastkv-60": {"recent": 0.2, "decay": 0.7},
}
