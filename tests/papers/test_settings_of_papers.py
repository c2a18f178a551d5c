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


PROTOCOL = {  # of a whole paper: protocol, chat template, cut of long prompts by model
    "circuitkv": ("question-aware", False, {"Llama-3-8B-Instruct": 7950, "default": 127500}),
    "curdkv": ("question-agnostic", None, {}),
    "fastkv": ("question-aware", None, {"default": 127500}),
    "kvfundabench": ("question-aware", None, {}),
    "laprox": ("question-aware", None, {}),
}
NINE = ("90%", "80%", "70%", "60%", "50%", "40%", "30%", "20%", "10%")
MEASURED = {  # tasks, budgets kept, lengths, samples, bound of answers
    "circuitkv/results-128": (("longbench",), ("128",), (), None, None),
    "circuitkv/results-256": (("longbench",), ("256",), (), None, None),
    "circuitkv/results-512": (("longbench",), ("512",), (), None, None),
    "circuitkv/results-1024": (("longbench",), ("1024",), (), None, None),
    "circuitkv/results-2048": (("longbench",), ("2048",), (), None, None),
    "curdkv/table-1": (("longbench",), ("100%",), (), None, None),
    "curdkv/table-2": (("longbench",), ("70%", "10%"), (), None, None),
    "curdkv/table-3": (("ruler-needles",), ("100%",), (16384,), None, None),
    "curdkv/table-4": (("ruler-needles",), ("70%", "10%"), (16384,), None, None),
    "curdkv/table-13": (("longbench",), ("50%", "30%"), (), None, None),
    "curdkv/table-14": (("longbench",), ("50%", "30%"), (), None, None),
    "curdkv/table-15": (("ruler-needles",), ("50%", "30%"), (16384,), None, None),
    "curdkv/table-16": (("ruler-needles",), ("50%", "30%"), (16384,), None, None),
    "curdkv/table-17": (("longbench",), ("70%", "10%"), (), None, None),
    "fastkv/table-1": (("longbench14",), ("512", "2048"), (), None, None),
    "fastkv/table-2": (("longbench14",), ("128", "512", "1024", "2048"), (), None, None),
    "fastkv/table-3": (("longbench14",), ("128", "512", "1024", "2048"), (), None, None),
    "fastkv/table-4": (("longbench14",), ("128", "512", "1024", "2048"), (), None, None),
    "fastkv/figure-needle": (("niah",), ("512",), tuple(range(8000, 128001, 8000)), 10, 50),
    "fastkv/figure-propagation": (("longbench14",), ("512",), (), None, None),
    "kvfundabench/table-1": (
        ("gsm8k-0", "gsm8k-8", "mmlu-0", "mmlu-5"), ("100%",), (), None, None,
    ),
    "kvfundabench/table-2": (
        ("longgenbench-gsm8k",), ("40%", "35%", "30%", "25%"), (), None, None,
    ),
    "kvfundabench/table-3": (("gsm8k-50",), ("40%", "30%", "20%", "10%"), (), None, None),
    "kvfundabench/table-5": (("gsm8k-8",), NINE, (), None, None),
    "kvfundabench/table-6": (
        ("mmlu-5", "gsm8k-8", "csqa-4", "jailbreakv-8", "humaneval-8"), NINE, (), None, None,
    ),
    "kvfundabench/table-7": (("gsm8k-8",), NINE[:8], (), None, None),
    "kvfundabench/table-8": (("gsm8k-1", "gsm8k-2", "gsm8k-4", "gsm8k-6"), NINE, (), None, None),
    "kvfundabench/table-9": (("gsm8k-50",), NINE, (), None, None),
    "laprox/longbench": (("longbench",), ("128", "256", "512", "1024", "5%"), (), None, None),
    "laprox/figure-3": (
        ("niah", "niah-multi-single", "niah-multi-multi"), ("5%",), (8000, 16000, 32000), 10, None,
    ),
    "laprox/ablation": (("longbench",), ("128", "512"), (), None, None),
}  # fmt: skip
TASKS_OF_FASTKV = 14


@pytest.mark.parametrize("one", [r for r in recipes() if r.kind == "eval"], ids=lambda r: r.name)
def test_each_table_is_measured_as_the_paper_did(one):
    tasks = ("longbench14",) if len(one.tasks) == TASKS_OF_FASTKV else one.tasks
    found = (tasks, one.keeps, one.lengths, one.samples, one.max_new_tokens)
    assert found == MEASURED[one.name]
    assert (one.protocol, one.chat, {**one.truncate_at}) == PROTOCOL[one.paper]


def test_no_table_is_wanted_in_vain():
    assert {*MEASURED} == {one.name for one in recipes() if one.kind == "eval"}
