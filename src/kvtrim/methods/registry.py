"""METHODS: one entry per published name. A method is a product: policy x budget x schedule x unit.

To add one: write `policies/NAME.py` (or reuse a policy) and add its entry here, with `source`,
`use` and `cost`. Nothing else: the command line, the tests and docs/methods.md read this one.
"""

from collections.abc import Mapping
from types import MappingProxyType

from kvtrim.methods.budgets import (
    Global,
    HeadTable,
    LayerShare,
    PerHead,
    Pyramid,
    Unlimited,
    WholeHeads,
)
from kvtrim.methods.method import Method
from kvtrim.methods.policies.cake import TAUS, Cake
from kvtrim.methods.policies.circuitkv import CircuitKV
from kvtrim.methods.policies.critical import Critical
from kvtrim.methods.policies.curdkv import CurDKV
from kvtrim.methods.policies.defensive import Defensive
from kvtrim.methods.policies.duoattention import DuoAttention
from kvtrim.methods.policies.echo import Echo
from kvtrim.methods.policies.expected_attention import ExpectedAttention
from kvtrim.methods.policies.full import Full
from kvtrim.methods.policies.h2o import H2O
from kvtrim.methods.policies.keydiff import KeyDiff
from kvtrim.methods.policies.knorm import KNorm
from kvtrim.methods.policies.kvgrad import KVgrad
from kvtrim.methods.policies.kvzip import KVzip
from kvtrim.methods.policies.laprox import LaProx
from kvtrim.methods.policies.lava import Lava
from kvtrim.methods.policies.pyramidinfer import PyramidInfer
from kvtrim.methods.policies.random import Random
from kvtrim.methods.policies.shotkv import ShotKV
from kvtrim.methods.policies.snapkv import SnapKV
from kvtrim.methods.policies.streaming_llm import StreamingLLM
from kvtrim.methods.policies.tova import Tova
from kvtrim.methods.propagation import Cascade, Restart, TokenSelective
from kvtrim.methods.schedule import Schedule
from kvtrim.methods.unit import Chunk, Shot

_LAYER = {"budget": "per-head", "floor": 0.0}
_EVERY_STEP = Schedule(every=1)
_BOUNDED = {"every": 1, "ahead": True}
_GENERATED = Schedule(every=1, region="generated")
_KVPRESS = {"window": 64, "kernel": 5, "pool": "avg", "rows": "mean", "group_order": "after"}
_CHUNKS_OF_KVPRESS = {"chunk": 20, "reduce": "mean", "shared": True, "window_competes": True}
_KVF = {"window": 8, "kernel": 7, "pool": "max"}
_DEFENSIVE = {"among": "heads", "own": "before"}
_CURDKV = {
    "paper": {},
    "authors": {"project": None, "local_window": 16, "padding": "front"},
    "kvpress": {"project": None, "local_window": 16, "padding": "tail"},
}
_BLOCKS = {"region": "blocks", "every": 16, "share": 0.9, "deepest": 0.1, "newest": 0.2}
_CASCADE = {
    "upstream": {"recent": 0.2, "decay": 0.9},
    "upstream-13b": {"recent": 0.2, "decay": 0.8, "interval": 2},
    "upstream-70b": {"recent": 0.2, "decay": 0.9, "interval": 3},
    "fastkv-35": {"recent": 0.01, "decay": 0.01},
    "fastkv-50": {"recent": 0.2, "decay": 0.3},
    "fastkv-60": {"recent": 0.2, "decay": 0.7},
    "generation": {"recent": 0.2, "decay": 0.9} | _BLOCKS,
}

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
                "kvf": {**_KVF, "granularity": "query"},
                "kvf-kv": _KVF,
                "fastkv-v1": {**_KVF, "pool": "avg", "granularity": "query"},
                "fastkv-head": {**_KVF, "granularity": "query"},
                "kvpress": _KVPRESS,
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
                "kvpress": {**_KVPRESS, "rounding": "kvpress"},
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
                "kvf": {**_KVF, "normalize": True, "granularity": "query"},
                "kvf-kv": {**_KVF, "normalize": True},
                "fastkv-v1": {**_KVF, "pool": "avg", "granularity": "query"},
                "kvpress": {**_KVPRESS, "rule": "floor"},
            },
        ),
        "headkv": Method(
            SnapKV(window=8, rows="mean"),
            budget=HeadTable(),
            source="arXiv 2410.19258",
            use="Models with a measured table: heads that retrieve get the room.",
            cost="As snapkv; the table is measured once per model (`kvtrim calibrate heads`).",
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
            use="Answers that need whole phrases: neighbouring tokens stay together.",
            cost="As snapkv; entries that no whole run fits into stay unused.",
            presets={
                "paper": {"granularity": "query", "reuse": 2},
                "kvpress": {**_KVPRESS, "group": "mean", **_CHUNKS_OF_KVPRESS},
            },
        ),
        "criticalkv": Method(
            Critical(),
            source="arXiv 2502.03805",
            use="To repair a scorer that overlooks rare tokens whose values weigh much.",
            cost="As the scorer it wraps, and every value through every output projection.",
            presets={
                "ada": {"budget": "per-head", "rule": "floor"},
                "kvpress": {**_KVPRESS, "count_protected": True},
            },
        ),
        "defensivekv": Method(
            Defensive(),
            budget=PerHead(floor=0.0),
            source="arXiv 2510.13334",
            use="As adakv, where one query of the window may ask for what no other does.",
            cost="As snapkv without its sums, one sort per head, and every value through W_O.",
            presets={"upstream": _DEFENSIVE},
        ),
        "layer-defensivekv": Method(
            Defensive(),
            budget=Global(),
            source="arXiv 2510.13334",
            use="As defensivekv; layers compete as well as heads.",
            cost="As defensivekv, and one pool of scores for the model.",
            presets={"upstream": _DEFENSIVE},
        ),
        "laprox": Method(
            LaProx(),
            budget=Global(),
            source="arXiv 2605.07234",
            use="Where layers differ: one budget, spent where the projected output needs it.",
            cost="As snapkv, a small product per value, and one pool of scores for the model.",
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
            use="Many questions on one saved context, none of them known: the strongest there.",
            cost="The model reads the context a second time: about three prefills in all.",
            presets={"layer": _LAYER, "uniform": {"budget": "uniform"}},
        ),
        "echo": Method(
            Echo(),
            budget=Global(anew=True),
            source="arXiv 2601.07891",
            use="Many questions on one context, none of them known, at the price of one prefill.",
            cost="A product per token, a few queries' attention; a table (`calibrate echo`).",
            presets={"uniform": {"budget": "uniform"}, "stream": {"chunks": True, "every": 64}},
        ),
        "echo-window": Method(
            Echo(window=32),
            budget=Global(anew=True),
            source="arXiv 2601.07891, arXiv 2404.14469",
            use="A known question and a small budget: what a window looks at, and an echo would.",
            cost="As echo, and a window's attention.",
        ),
        "kvzip-plus": Method(
            KVzip(plus=True),
            budget=Global(),
            source="NVIDIA/kvpress@8bb29b9",
            use="As kvzip; what an entry adds to the layer's output counts, not attention alone.",
            cost="As kvzip, and one small product per value.",
            presets={"uniform": {"budget": "uniform"}},
        ),
        "kvgrad": Method(
            KVgrad(),
            budget=Global(),
            source="NVIDIA/kvpress 0.5.5",
            use="As kvzip, at an eighth and below: what counts reaches the model's last states.",
            cost="Reads the context three times in parts, once with gradients: memory and time of "
            "a training step on 512 tokens.",
            presets={"uniform": {"budget": "uniform"}},
        ),
        "expected-attention": Method(
            ExpectedAttention(),
            source="arXiv 2510.00636",
            use="Contexts compressed before any question is known, with nothing to calibrate.",
            cost="A covariance of the prompt's queries per head, and its product with every key.",
            presets={"kvpress": {"budget": "per-head", "rule": "floor", "eps": 0.01}},
        ),
        "kvzip-head": Method(
            DuoAttention(window=0),
            budget=WholeHeads(measure="kvzip"),
            source="arXiv 2505.23416",
            use="As duoattention; heads are ranked by what a repetition of texts looks at.",
            cost="Nothing to compute; the table is measured once per model (`kvtrim calibrate "
            "heads --score kvzip`).",
        ),
        "duoattention": Method(
            DuoAttention(),
            budget=WholeHeads(),
            source="arXiv 2410.10819",
            use="Models with a measured table and budgets of half the prompt: some heads see all.",
            cost="Nothing to compute; the table is measured once per model (`kvtrim calibrate "
            "heads`).",
            presets={"paper": {"sinks": 64, "window": 256}},
        ),
        "lava": Method(
            Lava(),
            budget=PerHead(layers=LayerShare()),
            source="arXiv 2509.09754",
            use="Tight budgets on long prompts: layers and heads with flat scores get more.",
            cost="As snapkv, one sort per layer; layers are cut again as later ones join.",
            presets={"upstream": {"floor_of": "keep", "spread": False}},
        ),
        "cake": Method(
            Cake(),
            budget=LayerShare(rounding="even"),
            schedule=_EVERY_STEP,
            source="arXiv 2503.12491",
            use="Long generations in which some layers shift their attention more than others.",
            cost="As snapkv and a variance; one attention row per step while generating.",
            presets={
                "prefill": {"every": None},
                "upstream": {"spread": False},
                **TAUS,
            },
        ),
        "curdkv": Method(
            CurDKV(),
            source="arXiv 2509.15038",
            use="Contexts compressed before any question is known: no attention is needed.",
            cost="Two random projections per entry; no queries, no attention.",
            presets=_CURDKV,
        ),
        "ada-curdkv": Method(
            CurDKV(),
            budget=PerHead(rule="floor"),
            source="arXiv 2509.15038",
            use="As curdkv, where heads differ in how much of their energy is concentrated.",
            cost="As curdkv, and one sort per layer; attention runs over heads of unequal length.",
            presets=_CURDKV,
        ),
        "keydiff": Method(
            KeyDiff(),
            source="arXiv 2504.15364",
            use="Contexts compressed before any question is known; streams under a hard cap.",
            cost="One cosine per key; no queries, no attention.",
            presets={"paper": {"chunks": True}, "kvpress": {}, "bounded": {"every": 1}},
        ),
        "circuitkv": Method(
            CircuitKV(),
            source="Js-Hwang1/submission_folder",
            use="To compare with its benchmark rows; it leans to early tokens.",
            cost="As snapkv with a short window, and ten steps of a walk over the prompt.",
            presets={
                "v4.3": {},
                "head-shared": {"window": 64, "surface": "split"},
                "head-perhead": {"window": 64, "surface": "own", "granularity": "query"},
            },
        ),
        "shotkv": Method(
            ShotKV(),
            schedule=_GENERATED,
            unit=Shot(),
            source="arXiv 2502.01941 v4",
            use="Prompts of many examples: whole examples stay, not pieces of each.",
            cost="As h2o over the prompt; one attention row per step while generating.",
            presets={"prefill-only": {"every": None}},
        ),
        "random-shot": Method(
            Random(window=0, sinks=0),
            schedule=_GENERATED,
            unit=Shot(reduce="first"),
            source="baseline of arXiv 2502.01941",
            use="The floor for shotkv: the same shots in random order.",
            cost="Nothing to compute.",
            presets={"prefill-only": {"every": None}},
        ),
        "fastkv": Method(
            SnapKV(window=8, rows="sum", group="sum", group_order="after"),
            propagation=TokenSelective(),
            source="arXiv 2502.01068",
            use="Long prompts whose prefill takes too long: half of it is saved, or more.",
            cost="Less than a plain prefill: layers above one read a part of the prompt.",
            presets={"v1": {"pool": "avg", "tokens": 2048}, "v3": {}},
        ),
        "gemfilter": Method(
            Full(),
            budget=Unlimited(),
            propagation=Restart(),
            source="arXiv 2409.17422",
            use="One short answer from a long prompt, when its first token should come soon.",
            cost="The first layers on all tokens, then the whole model on what they chose.",
            presets={"upstream": {}},
        ),
        "pyramidinfer": Method(
            PyramidInfer(),
            budget=Unlimited(),
            propagation=Cascade(),
            source="arXiv 2405.12532",
            use="Budgets of a third of the prompt or more, with a prefill that gets faster.",
            cost="Attention of the prompt's last tokens, once per layer; layers read ever less.",
            presets=_CASCADE,
        ),
    }
)
