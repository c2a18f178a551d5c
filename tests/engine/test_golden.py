"""Every method keeps the tokens that its reference implementation kept."""

import json
from functools import partial

import pytest
import torch

import golden
import kvtrim
from kvtrim.engine.layer import Call
from kvtrim.engine.session import Session
from kvtrim.methods.budgets import Pyramid
from kvtrim.methods.keep import Keep
from kvtrim.methods.settings import find
from kvtrim.types import Probed, Room
from views import rope


def window_settings(params):
    """The parameters of a window score as kvtrim names them."""
    settings = {"window": params["window"]}
    if "kernel" in params:
        settings |= {"kernel": params["kernel"], "pool": params["pooling"]}
    if "rows" in params:
        settings["rows"] = params["rows"]
    if params.get("granularity") == "query_head":
        settings["granularity"] = "query"
    elif params.get("group_reduce"):
        settings["group"] = params["group_reduce"]
        settings["group_order"] = params.get("group_order", "before_pool").removesuffix("_pool")
    return settings


def require_match(case, kept):
    prefixes = [f"l{i}/" for i in range(len(kept))] if len(kept) > 1 else [""]
    wrong = {i: case.differing_heads(kept[i], prefix) for i, prefix in enumerate(prefixes)}
    assert not any(wrong.values()), wrong


def recorded(file, **wanted):
    """Parametrize over the recorded cases whose parameters have these values."""
    chosen = [
        case
        for case in golden.cases(file)
        if all(case.params.get(name) in values for name, values in wanted.items())
    ]
    assert chosen
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.id)


@recorded("snapkv")
def test_snapkv(case):
    settings = window_settings(case.params)
    require_match(
        case, kvtrim.select("snapkv", *case.qkv(), keep=case.params["capacity"], **settings)
    )


@recorded("adakv")
def test_adakv(case):
    params = case.params
    settings = window_settings(params) | {"floor": params["floor"]}
    if params.get("variant") == "kvpress":
        settings["rule"] = "floor"
    else:
        settings["normalize"] = params["normalize"]
    keep = params.get("capacity") or params["n_kept"]
    require_match(case, kvtrim.select("adakv", *case.qkv(), keep=keep, **settings))


@recorded("pyramidkv", kind=["indices"])
def test_pyramidkv_keeps_the_same_tokens(case):
    params = case.params
    settings = window_settings(params) | {"beta": params["beta"]}
    require_match(
        case, kvtrim.select("pyramidkv", *case.qkv(), keep=params["capacity"], **settings)
    )


@recorded("pyramidkv", kind=["budget_table"])
def test_pyramidkv_gives_layers_the_same_room(case):
    params = case.params
    rounding = {"adakv_pyram": "adakv"}.get(params["variant"], params["variant"])
    pyramid = Pyramid(beta=params["beta"], rounding=rounding)
    for n, caps in zip(case.tensor("n").tolist(), case.tensor("caps").tolist(), strict=True):
        ratio = params.get("compression_ratio")
        asked = float(params["capacity"]) if ratio is None else n * (1 - ratio)
        if asked >= n:
            continue  # nothing is evicted, the budget is never asked
        if asked <= params["window"]:
            continue  # kvpress keeps an arbitrary part of its window there; kvtrim never cuts it
        rooms = [
            Room(i, params["layers"], 2, int(asked), asked, params["window"], n)
            for i in range(params["layers"])
        ]
        scores = torch.zeros(1, 2, n - params["window"])
        got = [int(pyramid.counts(room, scores)[0, 0]) + params["window"] for room in rooms]
        assert got == caps, n


@recorded("h2o", variant=["prefill", "observed_mean"])
def test_h2o_at_the_end_of_the_prompt(case):
    params = case.params
    settings = window_settings(params) | {"every": None}
    settings.pop("group_order", None)
    keep = params.get("capacity") or params["n_kept"]
    settings["per_query"] = params["variant"] == "observed_mean"
    require_match(case, kvtrim.select("h2o", *case.qkv(), keep=keep, **settings))


@recorded("h2o", variant=["online"])
def test_h2o_while_generating(case):
    params = case.params
    (q,), (k,), (v,) = case.qkv()
    method = find("h2o", window=params["recent"], granularity="query")
    session = Session(method, Keep.parse(params["heavy"] + params["recent"]), layers=1)
    steps = [params["prefill"]] + [1] * params["decode_steps"]
    start = 0
    for count in steps:
        part = slice(start, start + count)
        session.begin(1, count)
        session.attend(
            0, Call(q[None, :, part], k[None, :, part], v[None, :, part], q.shape[-1] ** -0.5)
        )
        session.end()
        start += count
    dense, lengths = session.state.layers[0].store.dense()
    assert lengths is None
    assert not case.differing_heads(dense["positions"][0])
    torch.testing.assert_close(
        dense["carried"][0], case.tensor("accumulated").float(), rtol=1e-4, atol=1e-5
    )


@recorded("streamingllm")
def test_streaming_llm(case):
    params = case.params
    kept = kvtrim.select(
        "streaming-llm", *case.qkv(), keep=params["capacity"], sinks=params["sink"]
    )
    require_match(case, kept)


@recorded("knorm")
def test_knorm(case):
    require_match(case, kvtrim.select("knorm", *case.qkv(), keep=case.params["n_kept"]))


@recorded("tova")
def test_tova(case):
    params = case.params
    kept = kvtrim.select("tova", *case.qkv(), keep=params["n_kept"], protect_last=params["window"])
    require_match(case, kept)


@recorded("chunkkv", variant=["paper"])
def test_chunkkv(case):
    params = case.params
    settings = window_settings(params) | {"chunk": params["chunk"]}
    require_match(case, kvtrim.select("chunkkv", *case.qkv(), keep=params["capacity"], **settings))


@recorded("chunkkv", variant=["kvpress"])
def test_chunkkv_of_kvpress(case):
    params = case.params
    settings = window_settings(params) | {"preset": "kvpress", "chunk": params["chunk"]}
    n = case.qkv()[0][0].shape[1]
    keep = int(n * (1 - params["compression_ratio"]))
    require_match(case, kvtrim.select("chunkkv", *case.qkv(), keep=keep, **settings))


@recorded("expected_attention")
def test_expected_attention(case):
    params = case.params
    settings = params["settings"] | {"rotate": partial(rope, theta=params["theta"])}
    if params["budget"] == "per-head":
        settings |= {"budget": "per-head", "floor": 0.0}
    kept = kvtrim.select("expected-attention", *case.qkv(), keep=params["keep"], **settings)
    require_match(case, kept)


@recorded("duoattention")
def test_duoattention(case, tmp_path):
    params, rows = case.params, case.tensor("table").tolist()
    table = {f"{i}-{j}": [x] for i, row in enumerate(rows) for j, x in enumerate(row)}
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table))
    settings = {"sinks": params["sinks"], "window": params["window"], "table": str(path)}
    require_match(
        case, kvtrim.select("duoattention", *case.qkv(), keep=params["keep"], **settings)
    )


@recorded("kvzip_plus")
def test_kvzip_plus(case):
    require_match(case, kept_after_probe("kvzip-plus", case))


@recorded("kvgrad")
def test_kvgrad(case):
    require_match(case, kept_after_probe("kvgrad", case))


def kept_after_probe(name, case):
    """Positions after a prompt and its probe, handed over as by a model, pass by pass."""
    params, stacks, end = case.params, case.qkv(), case.params["prompt"]
    method = find(name, budget=params["budget"], floor=0.0)
    session = Session(method, Keep.parse(params["keep"]), len(stacks[0]))
    differentiates = method.policy.differentiates

    def hand_over(first, last):
        for index, (q, k, v) in enumerate(zip(*stacks, strict=True)):
            weight = golden._tensors("inputs")[f"wo/{params['wo'][index]}"]
            output = weight.unflatten(1, (q.shape[0], -1)).permute(1, 2, 0)
            hidden = torch.ones(1, last - first, 48)
            if first >= end and not differentiates:
                hidden = case.tensor("hidden")[index, first - end : last - end][None]
            call = Call(
                *(each[None, :, first:last] for each in (q, k, v)),
                scale=q.shape[-1] ** -0.5,
                output=lambda output=output: output,
                factor=lambda output=output: torch.linalg.qr(output.mT).R,
                hidden=hidden,
            )
            session.attend(index, call)
        session.end()

    session.begin(rows=1, columns=end)
    hand_over(0, end)
    first = end
    for number, (tokens, start, stop) in enumerate(params["steps"], 1):
        last, behind = number == len(params["steps"]), first - end
        gradients = None
        if differentiates:
            gradients = case.tensor("sensitivity")[:, behind : behind + tokens]
        session.begin_probe(tokens, None, [Probed(start, stop, gradients)], last)
        hand_over(first, first + tokens)
        first += tokens
    stores = [held.store for held in session.state.layers]
    return [
        [
            store.buffers["positions"][at : at + count]
            for at, count in zip(store.start[0].tolist(), store.length[0].tolist(), strict=True)
        ]
        for store in stores
    ]
