"""METHODS: one entry per published name. A method is a product: policy x budget x schedule x unit.

To add one: write `policies/NAME.py` (or reuse a policy) and add its entry here. Nothing else: the
command line, the tests and the tables read this one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from kvtrim.budgets import Budget, PerHead, Pyramid, Uniform, Unlimited
from kvtrim.policies.base import Policy
from kvtrim.policies.full import Full
from kvtrim.policies.h2o import H2O
from kvtrim.policies.knorm import KNorm
from kvtrim.policies.random import Random
from kvtrim.policies.shotkv import ShotKV
from kvtrim.policies.snapkv import SnapKV
from kvtrim.policies.streaming_llm import StreamingLLM
from kvtrim.policies.tova import Tova
from kvtrim.schedules import Schedule
from kvtrim.selection import Chunk, Shot, Token, Unit

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """A published way to make the cache small."""

    policy: Policy
    budget: Budget = field(default_factory=Uniform)
    schedule: Schedule = field(default_factory=Schedule)
    unit: Unit = field(default_factory=Token)
    granularity: Literal["kv", "query"] = "kv"  # which heads hold entries of their own
    skip_layers: tuple[int, ...] = ()  # layers that keep everything
    reuse: int = 1  # so many neighbouring layers share the slots that the first of them kept
    source: str = ""
    presets: Mapping[str, Settings] = field(default_factory=dict, compare=False)


_KVPRESS_WINDOW = {
    "window": 64,
    "kernel": 5,
    "pool": "avg",
    "rows": "mean",
    "group_order": "after",
}
_KVF_WINDOW = {"window": 8, "kernel": 7, "pool": "max"}
_EVERY_STEP = Schedule(every=1)
_GENERATED = Schedule(every=1, region="generated")

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "full": Method(Full(), budget=Unlimited(), source="plain causal attention"),
        "random": Method(Random(), source="baseline"),
        "streaming-llm": Method(
            StreamingLLM(),
            source="arXiv 2309.17453",
            presets={"kvf": {}, "kvpress": {}, "bounded": {"every": 1, "ahead": True}},
        ),
        "knorm": Method(
            KNorm(),
            source="arXiv 2406.11430",
            presets={"upstream": {}, "kvf": {"skip_layers": (0, 1)}, "kvpress": {}},
        ),
        "snapkv": Method(
            SnapKV(),
            source="arXiv 2404.14469",
            presets={
                "upstream": {"granularity": "query"},
                "kvf": {**_KVF_WINDOW, "granularity": "query"},
                "kvf-kv": _KVF_WINDOW,
                "fastkv-v1": {**_KVF_WINDOW, "pool": "avg", "granularity": "query"},
                "fastkv-head": {**_KVF_WINDOW, "granularity": "query"},
                "kvpress": _KVPRESS_WINDOW,
            },
        ),
        "h2o": Method(
            H2O(),
            schedule=_EVERY_STEP,
            source="arXiv 2306.14048",
            presets={
                "prefill": {"window": 8, "every": None},
                "kvf": {"window": 8, "every": None, "granularity": "query"},
                "observed": {"window": 0, "every": None, "per_query": True},
            },
        ),
        "tova": Method(
            Tova(),
            schedule=_EVERY_STEP,
            source="arXiv 2401.06104",
            presets={"upstream": {}, "kvpress": {"every": None, "protect_last": 1}},
        ),
        "pyramidkv": Method(
            SnapKV(window=8),
            budget=Pyramid(),
            source="arXiv 2406.02069",
            presets={
                "kvf": {"granularity": "query"},
                "adakv": {"window": 32, "rounding": "adakv", "granularity": "query"},
                "kvpress": {**_KVPRESS_WINDOW, "rounding": "kvpress"},
            },
        ),
        "adakv": Method(
            SnapKV(rows="mean"),
            budget=PerHead(),
            source="arXiv 2407.11550",
            presets={
                "upstream": {"floor": 0.5, "granularity": "query"},
                "upstream-gqa": {"floor": 0.2},
                "kvf": {**_KVF_WINDOW, "normalize": True, "granularity": "query"},
                "kvf-kv": {**_KVF_WINDOW, "normalize": True},
                "fastkv-v1": {**_KVF_WINDOW, "pool": "avg", "granularity": "query"},
                "kvpress": {**_KVPRESS_WINDOW, "rule": "floor"},
            },
        ),
        "chunkkv": Method(
            SnapKV(kernel=1, group="sum"),
            unit=Chunk(),
            source="arXiv 2502.00299",
            presets={
                "paper": {"granularity": "query", "reuse": 2},
                "kvpress": {
                    **_KVPRESS_WINDOW,
                    "group": "mean",
                    "chunk": 20,
                    "reduce": "mean",
                    "shared": True,
                    "window_competes": True,
                },
            },
        ),
        "shotkv": Method(
            ShotKV(),
            schedule=_GENERATED,
            unit=Shot(),
            source="arXiv 2502.01941 v4",
            presets={"prefill-only": {"every": None}},
        ),
        "random-shot": Method(
            Random(window=0, sinks=0),
            schedule=_GENERATED,
            unit=Shot(reduce="first"),
            source="baseline of arXiv 2502.01941",
            presets={"prefill-only": {"every": None}},
        ),
    }
)
