"""What each paper's methods are, written by hand from the papers' texts and code.

Every row of every recipe is resolved into all its parameters, printed (`pytest -s`), and compared
with these values. Sources: the specifications of the methods, which say paper or code for each.
"""

import sys

import pytest

from kvtrim.methods.settings import find, spell_out
from kvtrim.papers.recipe import recipes

QUERY, KV = {"granularity": "query"}, {"granularity": "kv"}
PREFILL = {"schedule.every": None}  # nothing is evicted while an answer is written
ONCE = {**PREFILL, "refit": "Unchanged", "positions": "original", "skip_layers": [], "reuse": 1}
WINDOW_8 = {"policy": "SnapKV", "policy.window": 8, "policy.kernel": 7, "policy.sinks": 0}
KVPRESS = {"policy.window": 64, "policy.kernel": 5, "policy.pool": "avg", "policy.rows": "mean"}
KVPRESS |= {"policy.group": "mean", "policy.group_order": "after", "policy.sinks": 4}
CURDKV = {"policy": "CurDKV", "policy.project": 20, "policy.leverage": "kv", "policy.sinks": 4}
CURDKV |= {"policy.local_window": None}
STREAMING = {"policy": "StreamingLLM", "policy.sinks": 4, "budget": "Uniform", **ONCE, **KV}
H2O_PREFILL = {"policy": "H2O", "policy.window": 8, "budget": "Uniform", **ONCE, **QUERY}
SNAPKV_KVF = {**WINDOW_8, "policy.pool": "max", "policy.rows": "sum", "budget": "Uniform"}
SNAPKV_KVF |= {**ONCE, **QUERY}
PYRAMID_KVF = {**SNAPKV_KVF, "budget": "Pyramid", "budget.beta": 20, "budget.rounding": "kvf"}
SHOTS = {"unit": "Shot", "unit.fill": "stop", "unit.count_fixed": True, "schedule.every": 1}
SHOTS |= {"schedule.region": "generated", "budget": "Uniform", **KV}

WANTED = {
    # FastKV, first version: window 8, kernel 7, average pooling; its baselines hold query heads
    "fastkv": {
        "snapkv": {**WINDOW_8, "policy.pool": "avg", "budget": "Uniform", **ONCE, **QUERY},
        "adakv": {
            **WINDOW_8, "policy.pool": "avg", "policy.rows": "mean", "budget": "PerHead",
            "budget.floor": 0.2, "budget.rule": "blend", "budget.normalize": False,
            **ONCE, **QUERY,
        },
        "headkv": {
            **WINDOW_8, "policy.pool": "avg", "policy.rows": "mean", "budget": "HeadTable",
            "budget.beta": 1.2, "budget.temp": 1.0, "budget.window_inside": True, **ONCE, **QUERY,
        },
        "gemfilter": {
            "propagation": "Restart", "propagation.kernel": 5, "propagation.pad": "zero",
        },
        "fastkv": {
            **WINDOW_8, "policy.pool": "avg", "policy.rows": "sum", "policy.group": "sum",
            "policy.group_order": "after", "budget": "Uniform", "propagation": "TokenSelective",
            "propagation.tokens": 2048, **ONCE, **KV,
        },
        "512 sent on": {"propagation.tokens": 512},
        "1024 sent on": {"propagation.tokens": 1024},
        "2048 sent on": {"propagation.tokens": 2048},
        "4096 sent on": {"propagation.tokens": 4096},
    },
    # CircuitKV's results: KVCache-Factory's baselines, its own v4.3
    "circuitkv": {
        "snapkv": SNAPKV_KVF,
        "pyramidkv": PYRAMID_KVF,
        "h2o": H2O_PREFILL,
        "streaming-llm": STREAMING,
        "circuitkv": {
            "policy": "CircuitKV", "policy.window": 8, "policy.sinks": 4, "policy.steps": 10,
            "policy.temperature": 1.0, "policy.surface": "max", "budget": "Uniform", **ONCE, **KV,
        },
    },
    # CurDKV: kvpress's baselines on KV heads, four sinks for every one of them
    "curdkv": {
        "streaming-llm": STREAMING,
        "knorm": {"policy": "KNorm", "policy.sinks": 4, "budget": "Uniform", **ONCE, **KV},
        "snapkv": {"policy": "SnapKV", **KVPRESS, "budget": "Uniform", **ONCE, **KV},
        "chunkkv": {
            "policy": "SnapKV", **KVPRESS, "unit": "Chunk", "unit.chunk": 20,
            "unit.reduce": "mean",
            "unit.shared": True, "unit.window_competes": True, **ONCE, **KV,
        },
        "ada-snapkv": {
            "policy": "SnapKV", **KVPRESS, "budget": "PerHead", "budget.floor": 0.2,
            "budget.rule": "floor", **ONCE, **KV,
        },
        "curdkv": {**CURDKV, "budget": "Uniform", **ONCE, **KV},
        "ada-curdkv": {
            **CURDKV, "budget": "PerHead", "budget.floor": 0.2, "budget.rule": "floor",
            **ONCE, **KV,
        },
        "key": {**CURDKV, "policy.project": None, "policy.leverage": "key"},
        "value": {**CURDKV, "policy.project": None, "policy.leverage": "value"},
        "key-value": {**CURDKV, "policy.project": None},
        "key+random": {**CURDKV, "policy.leverage": "key"},
        "value+random": {**CURDKV, "policy.leverage": "value"},
        "key-value+random": CURDKV,
    },
    # KVFundaBench: KVCache-Factory's methods on query heads, H2O in the prompt alone
    "kvfundabench": {
        "streaming-llm": STREAMING,
        "snapkv": SNAPKV_KVF,
        "h2o": H2O_PREFILL,
        "pyramidkv": PYRAMID_KVF,
        "chunkkv": {
            "policy": "SnapKV", "policy.kernel": 1, "unit": "Chunk", "unit.chunk": 10,
            "unit.reduce": "sum", "reuse": 2, "schedule.every": None, **QUERY,
        },
        "pyramidinfer": {
            "propagation": "Cascade", "propagation.recent": 0.2, "propagation.sinks": 4,
            "propagation.min_context": 64, "propagation.weight": 1.2, "propagation.interval": 1,
        },
        "shotkv": {"policy": "ShotKV", "policy.observers": "all", "unit.reduce": "mean", **SHOTS},
        "random-shot": {"policy": "Random", **SHOTS},
    },
    # LaProx: one pool for the model, window 32, pooling 7 on the attention
    "laprox": {
        "streaming-llm": STREAMING,
        "snapkv": {**SNAPKV_KVF, **KV},
        "pyramidkv": {**PYRAMID_KVF, **KV},
        "adakv": {
            "policy": "SnapKV", "policy.window": 32, "policy.kernel": 7, "policy.pool": "max",
            "budget": "PerHead", "budget.floor": 0.2, **ONCE, **KV,
        },
        "criticalkv": {
            "policy": "Critical", "policy.first_stage": 0.5, "policy.eps": 1e-4, **ONCE, **KV,
        },
        "cake": {
            "policy": "Cake", "policy.window": 32, "policy.kernel": 5, "policy.gamma": 200.0,
            "budget": "LayerShare", **ONCE, **KV,
        },
        "laprox": {
            "policy": "LaProx", "policy.window": 32, "policy.kernel": 7, "policy.gqa": "prod",
            "policy.norm": "sum", "policy.pool_on": "attn", "policy.sinks": 0, "budget": "Global",
            **ONCE, **KV,
        },
        "one pool": {"policy": "LaProx", "policy.norm": "sum", "budget": "Global"},
        "by layer": {
            "policy": "LaProx", "policy.norm": "sum", "budget": "PerHead", "budget.floor": 0.0,
        },
        "uniform": {"policy": "LaProx", "policy.norm": "sum", "budget": "Uniform"},
        "unnormalised": {"policy": "LaProx", "policy.norm": "none", "budget": "Global"},
    },
}  # fmt: skip
ROWS = sorted({(r.paper, name, text) for r in recipes() for name, text in r.methods.items()})


@pytest.mark.parametrize(("paper", "name", "text"), ROWS)
def test_each_row_is_the_papers_method(paper, name, text):
    found = spell_out(find(text))
    sys.stdout.write(f"{paper}, {name} = {text}\n  {found}\n")
    if name == "full":
        assert text == "full"
        return
    wanted = WANTED[paper][name]
    assert {key: found.get(key, "absent") for key in wanted} == wanted


def test_no_row_is_wanted_in_vain():
    listed = {(paper, name) for paper, own in WANTED.items() for name in own}
    assert listed == {(paper, name) for paper, name, _ in ROWS if name != "full"}
