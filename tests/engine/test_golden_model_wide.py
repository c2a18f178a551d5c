"""Methods whose layers share one budget, or that choose in two stages, keep what was recorded."""

from test_golden import recorded, require_match

import golden
import kvtrim


def projections(case):
    names = case.params["wo"]
    names = [names] if isinstance(names, str) else names
    return [golden._tensors("inputs")[f"wo/{name}"] for name in names]


@recorded("criticalkv")
def test_criticalkv(case):
    params = case.params
    settings = {
        "preset": "kvpress",
        "window": params["window"],
        "kernel": params["kernel"],
        "first_stage": params["first_stage_ratio"],
        "eps": params["epsilon"],
    }
    if params["variant"] == "adaptive":
        settings |= {"budget": "per-head", "rule": "floor", "budget.floor": params["floor"]}
    kept = kvtrim.select(
        "criticalkv", *case.qkv(), keep=params["n_kept"], output=projections(case), **settings
    )
    require_match(case, kept)


@recorded("laprox")
def test_laprox(case):
    params = case.params
    settings = {
        "window": params["window"],
        "kernel": params["kernel"] or 1,
        "gqa": params["gqa"],
        "norm": params["norm"],
        "pool_on": params["pool_on"],
    }
    if params["alloc"] == "layer":
        settings |= {"budget": "per-head", "floor": 0.0}
    kept = kvtrim.select(
        "laprox", *case.qkv(), keep=params["budget"], output=projections(case), **settings
    )
    require_match(case, kept)


@recorded("lava")
def test_lava(case):
    params = case.params
    settings = {
        "preset": "upstream",
        "window": params["window"],
        "kernel": params["kernel"],
        "pool": params["pooling"],
        "budget.floor": params["floor"],
    }
    require_match(case, kvtrim.select("lava", *case.qkv(), keep=params["capacity"], **settings))


@recorded("cake")
def test_cake(case):
    params = case.params
    settings = {name: params[name] for name in ("window", "kernel", "gamma", "tau1", "tau2")}
    n, keep = case.qkv()[0][0].shape[1], params["capacity"]
    if n <= keep + params["window"]:
        keep = n  # the public code evicts nothing there; kvtrim does
    require_match(
        case, kvtrim.select("cake", *case.qkv(), keep=keep, preset="upstream", **settings)
    )


@recorded("defensivekv")
def test_defensivekv(case):
    params = case.params
    name = "defensivekv" if params["budget"] == "per-head" else "layer-defensivekv"
    kept = kvtrim.select(
        name,
        *case.qkv(),
        keep=params["keep"],
        output=projections(case),
        own=params["own"],
        among=params["among"],
    )
    require_match(case, kept)
