"""METHODS: one entry per published name. A method is a product: policy x budget x schedule x unit.

To add one: write `policies/NAME.py` (or reuse a policy) and add its entry here. Nothing else: the
command line, the tests and the tables read this one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from kvtrim.budgets import (
    Budget,
    Global,
    HeadTable,
    LayerShare,
    PerHead,
    Pyramid,
    Uniform,
    Unlimited,
)
from kvtrim.errors import UsageError
from kvtrim.policies.base import Policy
from kvtrim.policies.cake import Cake
from kvtrim.policies.circuitkv import CircuitKV
from kvtrim.policies.critical import Critical
from kvtrim.policies.curdkv import CurDKV
from kvtrim.policies.full import Full
from kvtrim.policies.h2o import H2O
from kvtrim.policies.keydiff import KeyDiff
from kvtrim.policies.knorm import KNorm
from kvtrim.policies.kvzip import KVzip
from kvtrim.policies.laprox import LaProx
from kvtrim.policies.lava import Lava
from kvtrim.policies.random import Random
from kvtrim.policies.snapkv import SnapKV
from kvtrim.policies.streaming_llm import StreamingLLM
from kvtrim.policies.tova import Tova
from kvtrim.schedules import Schedule
from kvtrim.selection import Chunk, Token, Unit
from kvtrim.types import Target

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
    positions: Literal["original", "rolled"] = "original"  # where kept keys stand for later
    # queries: where they were read, or closed up at their slot numbers
    source: str = ""
    presets: Mapping[str, Settings] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        """Refuse parts that do not go together."""
        if self.policy.probes and (self.schedule.every is not None or self.skip_layers):
            raise UsageError(
                f"{type(self.policy).__name__} probes the prompt once: use schedule=prompt and no "
                "skip_layers"
            )
        if not self.budget.model_wide:
            return
        if not self.unit.single or self.reuse > 1 or self.skip_layers or self.schedule.ahead:
            raise UsageError(
                "a model-wide budget deals with single tokens of every layer: use unit=token, "
                "reuse=1, no skip_layers, ahead=no, or another budget"
            )
        if self.policy.first_stage < 1:
            raise UsageError(
                f"{type(self.policy).__name__} chooses in two stages inside each head, which a "
                "model-wide budget cannot do; use budget=uniform or budget=per-head"
            )

    def fitted(self, target: Target) -> "Method":
        """This method, made ready for one model; errors as `Budget.fitted`."""
        return replace(self, budget=self.budget.fitted(target))


_KVPRESS_WINDOW = {
    "window": 64,
    "kernel": 5,
    "pool": "avg",
    "rows": "mean",
    "group_order": "after",
}
_KVF_WINDOW = {"window": 8, "kernel": 7, "pool": "max"}
_CURDKV_PRESETS = {
    "paper": {},
    "authors": {"project": None, "local_window": 16, "padding": "front"},
    "kvpress": {"project": None, "local_window": 16, "padding": "tail"},
}
_EVERY_STEP = Schedule(every=1)
_BOUNDED = {"every": 1, "ahead": True}

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "full": Method(Full(), budget=Unlimited(), source="plain causal attention"),
        "random": Method(Random(), source="baseline"),
        "streaming-llm": Method(
            StreamingLLM(),
            source="arXiv 2309.17453",
            presets={
                "upstream": {**_BOUNDED, "positions": "rolled"},
                "bounded": _BOUNDED,
                "kvf": {},
                "fastkv": {},
                "kvpress": {},
            },
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
                "upstream-ratio": {"granularity": "query"},
                "upstream-stream": {"heavy": 48, "positions": "rolled", "granularity": "query"},
                "prefill": {"window": 8, "every": None},
                "kvf": {"window": 8, "every": None, "granularity": "query"},
                "fastkv": {"window": 8, "every": None, "granularity": "query"},
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
        "headkv": Method(
            SnapKV(window=8, rows="mean"),
            budget=HeadTable(),
            source="arXiv 2410.19258",
            presets={
                "upstream": {"beta": 1.01, "granularity": "query"},
                "fastkv-v1": {"pool": "avg", "granularity": "query"},
                "kvf": {"beta": 1.01, "window_inside": False, "granularity": "query"},
                "kvf-kv": {"beta": 1.01, "window_inside": False},
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
        "criticalkv": Method(
            Critical(),
            source="arXiv 2502.03805",
            presets={
                "ada": {"budget": "per-head", "rule": "floor"},
                "kvpress": {**_KVPRESS_WINDOW, "count_protected": True},
            },
        ),
        "laprox": Method(
            LaProx(),
            budget=Global(),
            source="arXiv 2605.07234",
            presets={
                "literal": {"gqa": "attn"},
                "layer": {"budget": "per-head", "floor": 0.0},
                "uniform": {"budget": "uniform"},
                "unnormalised": {"norm": "none"},
            },
        ),
        "kvzip": Method(
            KVzip(),
            budget=Global(),
            source="arXiv 2505.23416",
            presets={
                "layer": {"budget": "per-head", "floor": 0.0},
                "uniform": {"budget": "uniform"},
            },
        ),
        "lava": Method(
            Lava(),
            budget=PerHead(layers=LayerShare()),
            source="arXiv 2509.09754",
            presets={"upstream": {"floor_of": "keep", "spread": False}},
        ),
        "cake": Method(
            Cake(),
            budget=LayerShare(rounding="even"),
            schedule=_EVERY_STEP,
            source="arXiv 2503.12491",
            presets={
                "prefill": {"every": None},
                "upstream": {"spread": False},
                "llama-3.1-8b-1024": {"tau1": 1.6, "tau2": 0.4},
                "llama-3.1-8b-128": {"tau1": 1.6, "tau2": 0.6},
                "mistral-7b-v0.3-1024": {"tau1": 0.8, "tau2": 0.5},
                "mistral-7b-v0.3-128": {"tau1": 1.0, "tau2": 0.8},
                "qwen2.5-7b-1024": {"tau1": 1.5, "tau2": 0.6},
                "qwen2.5-7b-128": {"tau1": 0.4, "tau2": 0.6},
                "llama-2-7b-1024": {"tau1": 1.9, "tau2": 1.8},
                "llama-2-7b-128": {"tau1": 0.9, "tau2": 2.3},
                "llama-2-13b-1024": {"tau1": 0.5, "tau2": 0.4},
                "llama-2-13b-128": {"tau1": 1.8, "tau2": 2.0},
            },
        ),
        "curdkv": Method(CurDKV(), source="arXiv 2509.15038", presets=_CURDKV_PRESETS),
        "ada-curdkv": Method(
            CurDKV(),
            budget=PerHead(rule="floor"),
            source="arXiv 2509.15038",
            presets=_CURDKV_PRESETS,
        ),
        "keydiff": Method(
            KeyDiff(),
            source="arXiv 2504.15364",
            presets={"kvpress": {}, "bounded": {"every": 1}},
        ),
        "circuitkv": Method(
            CircuitKV(),
            source="Js-Hwang1/submission_folder",
            presets={
                "v4.3": {},
                "head-shared": {"window": 64, "surface": "split"},
                "head-perhead": {"window": 64, "surface": "own", "granularity": "query"},
            },
        ),
    }
)
