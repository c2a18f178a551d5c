"""FastKV, GemFilter and PyramidInfer choose what their reference implementations chose."""

import pytest
import torch

import golden
import kvtrim
from kvtrim.engine.layer import Call
from kvtrim.engine.session import Session
from kvtrim.methods.keep import Keep
from kvtrim.methods.propagation import Cascade, TokenSelective
from kvtrim.methods.settings import find


def ids(case):
    return case.id


def passed_on(case, method, keep):
    """Positions that each layer reads, and behind them those that leave the last one."""
    session = Session(method, Keep.parse(keep), layers=len(case.inputs) + 1)
    stacks = [[*stack, stack[-1]] for stack in case.qkv()]
    session.begin(1, stacks[0][0].shape[1])
    read = []
    for index, (q, k, v) in enumerate(zip(*stacks, strict=True)):
        now = session.narrowing
        columns = torch.arange(q.shape[1]) if now is None else now.columns[0]
        read.append(columns)
        q, k, v = (x[None, :, columns] for x in (q, k, v))
        session.attend(index, Call(q, k, v, q.shape[-1] ** -0.5))
    return read


@pytest.mark.parametrize("case", golden.cases("fastkv"), ids=ids)
def test_fastkv(case):
    params = case.params
    assert params["rows"] == params["group_reduce"] == "sum"
    settings = {"window": params["window"], "kernel": params["kernel"], "pool": params["pooling"]}
    tokens = params["tsp_len"] or 1.0
    if params["variant"] == "head" and params["tsp_rate"]:
        tokens = params["tsp_rate"]
    method = find("fastkv", layer=0, tokens=tokens, **settings)
    keep = params.get("retain_rate") or params["capacity"]
    kept = kvtrim.select(method, *([*stack, *stack] for stack in case.qkv()), keep=keep)
    assert case.differing_heads(kept[0]) == []
    read = passed_on(case, method, keep)[1].tolist()
    if "kept_tsp" in case:
        want, free = (
            set(case.tensor(name).tolist()) if name in case else set()
            for name in ("kept_tsp", "free_tsp")
        )
        assert len(read) == len(want) and set(read) ^ want <= free
    else:
        assert read == list(range(len(read))) and len(read) == case.qkv()[0][0].shape[1]


@pytest.mark.parametrize("case", golden.cases("gemfilter"), ids=ids)
def test_gemfilter(case):
    params = case.params
    kept = kvtrim.select(
        "gemfilter", *case.qkv(), keep=params["n_kept"], layer=0, kernel=params["kernel"]
    )
    want = case.tensor("kept_tokens").tolist()
    assert all(head.tolist() == want for head in kept[0])


@pytest.mark.parametrize(
    "case", [c for c in golden.cases("pyramidinfer") if c.params["kind"] == "count_table"], ids=ids
)
def test_pyramidinfer_lengths(case):
    params = case.params
    cascade = Cascade(
        recent=params["recent_ratio"],
        decay=params["prefill_decay_ratio"],
        interval=params["interval"],
        sinks=params["sink"],
        min_context=params["min_context"],
    )
    for n, counts in zip(case.tensor("n").tolist(), case.tensor("counts").tolist(), strict=True):
        assert cascade.lengths(n, params["layers"], cascade.decay) == counts


@pytest.mark.parametrize(
    "case", [c for c in golden.cases("pyramidinfer") if c.params["kind"] == "indices"], ids=ids
)
def test_pyramidinfer(case):
    params, layers = case.params, case.params["layers"]
    method = find(
        "pyramidinfer",
        recent=params["recent_ratio"],
        decay=params["prefill_decay_ratio"],
        interval=params["interval"],
        sinks=params["sink"],
        min_context=params["min_context"],
        weight=params["distance_weight"],
    )
    kept = kvtrim.select(method, *case.qkv(), keep=1)
    for layer in range(layers):
        want = case.tensor(f"l{layer}/kept_tokens").tolist()
        assert all(head.tolist() == want for head in kept[layer])


def test_nothing_is_chosen_at_the_last_layer():
    assert not any(Cascade().chooses(layer, 1) for layer in range(1))
    assert [TokenSelective(layer=3).chooses(layer, 4) for layer in range(4)] == [False] * 4
