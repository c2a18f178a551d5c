"""METHODS: one entry per published name. A method is a product: policy x budget x schedule x unit.

To add one: write `policies/NAME.py` (or reuse a policy) and add its entry here, with `source`,
`use` and `cost`. Nothing else: the command line, the tests and docs/methods.md read this one.
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
from kvtrim.policies.snapkv import SnapKV
from kvtrim.policies.streaming_llm import StreamingLLM
from kvtrim.policies.tova import Tova
from kvtrim.schedules import Schedule
from kvtrim.selection import Chunk, Token, Unit

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
    use: str = ""  # one sentence: when it is the method to take
    cost: str = ""  # one sentence: what it computes and holds beside the entries it keeps
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
_BOUNDED = {"every": 1, "ahead": True}

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "full": Method(
            Full(),
            budget=Unlimited(),
            source="plain causal attention",
            use="The reference: where memory is no concern, and beside every other method.",
            cost="Every token of every layer and head stays.",
        ),
        "random": Method(
            Random(),
            source="baseline",
            use="The floor in comparisons: a method must beat it to be worth its name.",
            cost="Nothing to compute.",
        ),
        "streaming-llm": Method(
            StreamingLLM(),
            source="arXiv 2309.17453",
            use="Endless chats and streams in which only the recent text matters.",
            cost="Nothing to compute; rolled positions copy one layer's keys at every step.",
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
            use="Contexts compressed before any question is known: keys alone decide.",
            cost="One norm per key.",
            presets={"upstream": {}, "kvf": {"skip_layers": (0, 1)}, "kvpress": {}},
        ),
        "snapkv": Method(
            SnapKV(),
            source="arXiv 2404.14469",
            use="The first to try: a question at the end of the prompt says what matters.",
            cost="Attention of the last window queries over the prompt, once per layer.",
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
            use="Long generations under a fixed budget: what mattered to all tokens so far stays.",
            cost="A second pass of attention over the whole prompt, then one number per entry.",
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
            use="Long generations under a fixed budget, with no state beside the cache.",
            cost="The newest query's attention row at every step.",
            presets={"upstream": {}, "kvpress": {"every": None, "protect_last": 1}},
        ),
        "pyramidkv": Method(
            SnapKV(window=8),
            budget=Pyramid(),
            source="arXiv 2406.02069",
            use="Small budgets: low layers spread their attention, high layers focus it.",
            cost="As snapkv; layers differ in what they hold and in the time they take.",
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
            use="As snapkv, where heads differ: focused heads lend entries to scattered ones.",
            cost="As snapkv, and one sort per layer; attention runs over heads of unequal length.",
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
            use="Answers that need whole phrases: neighbouring tokens stay together.",
            cost="As snapkv; entries that no whole run fits into stay unused.",
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
    }
)
