"""What every entry of the registry promises, whatever its formula."""

import dataclasses
import importlib
import pkgutil

import pytest
import torch

import kvtrim
from kvtrim.methods import policies
from kvtrim.methods.policies.base import Policy
from kvtrim.methods.policies.output import output_factor
from kvtrim.methods.settings import find, parameters
from kvtrim.types import LayerView
from small import small, table
from views import rope

METHODS = sorted(name for name in kvtrim.METHODS if not find(name).policy.probes)
H, K, D, N = 6, 2, 8, 64


def method(name):
    return find(name, **small(name, layers=2, alike=K))


def qkv(seed=0, layers=2):
    draw = torch.Generator().manual_seed(seed)
    shapes = [(layers, H, N, D), (layers, K, N, D), (layers, K, N, D)]
    return [torch.randn(*shape, generator=draw) for shape in shapes]


def output(layers=2):
    """o_proj.weight of each layer: [M, H * D], the same for every KV group."""
    draw = torch.Generator().manual_seed(9)
    return [torch.randn(32, H // K * D, generator=draw).repeat(1, K)] * layers


def kept(name, q, k, v, keep=24):
    given = {"output": output(len(q)), "hidden": hidden(len(q)), "rotate": rope}
    return kvtrim.select(method(name), q, k, v, keep=keep, **given)


def hidden(layers=2, tokens=N):
    """What each layer's attention receives: [L, n, M]."""
    return torch.randn(layers, tokens, 48, generator=torch.Generator().manual_seed(3))


def as_lists(selected):
    return [[head.tolist() for head in layer] for layer in selected]


@pytest.mark.parametrize("name", METHODS)
def test_kept_positions_are_ascending_unique_and_within_the_prompt(name):
    for layer in kept(name, *qkv()):
        for head in layer:
            assert head.dtype == torch.int64
            assert head.tolist() == sorted(set(head.tolist()))
            assert 0 <= head.min() and head.max() < N


@pytest.mark.parametrize("name", METHODS)
def test_the_mean_number_kept_is_the_budget(name):
    counts = [len(head) for layer in kept(name, *qkv()) for head in layer]
    mean = sum(counts) / len(counts)
    own = find(name)
    if own.budget.unlimited and not own.propagation.restarts:  # a cascade leaves two layers alone
        assert mean == N
    else:
        slack = {"chunkkv": 10, "pyramidkv": 2, "shotkv": 16, "random-shot": 16}.get(name, 0)
        assert 24 - slack - 0.5 <= mean <= 24 + 0.1 * slack + 0.5, counts


@pytest.mark.parametrize("name", METHODS)
def test_sinks_and_window_are_always_kept(name):
    policy = method(name).policy
    recent = policy.recent(24)
    for layer in kept(name, *qkv()):
        for head in layer:
            assert set(range(policy.sinks)) | set(range(N - recent, N)) <= set(head.tolist())


@pytest.mark.parametrize("name", METHODS)
def test_the_input_is_left_untouched(name):
    tensors = qkv()
    copies = [t.clone() for t in tensors]
    kept(name, *tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_a_budget_as_long_as_the_prompt_keeps_everything(name):
    for keep in (N, N + 1, 10 * N, 1.0):
        assert all(
            head.tolist() == list(range(N))
            for layer in kept(name, *qkv(), keep=keep)
            for head in layer
        )


def drawn(name):
    """The scores come from a draw per head, which stays where it is when heads change places."""
    return "policy.seed" in parameters(find(name))


@pytest.mark.parametrize("name", [n for n in METHODS if not drawn(n)])
def test_permuting_kv_heads_permutes_the_result(name):
    q, k, v = qkv()
    group = H // K
    swapped = q.unflatten(1, (K, group)).flip(1).flatten(1, 2), k.flip(1), v.flip(1)
    expected = [list(reversed(layer)) for layer in as_lists(kept(name, q, k, v))]
    assert as_lists(kept(name, *swapped)) == expected


@pytest.mark.parametrize("name", METHODS)
def test_low_precision_input_is_scored_in_full_precision(name):
    for dtype in (torch.bfloat16, torch.float16):
        low = [t.to(dtype) for t in qkv()]
        assert as_lists(kept(name, *low)) == as_lists(kept(name, *(t.float() for t in low)))


@pytest.mark.parametrize("name", METHODS)
def test_a_prompt_scores_the_same_alone_and_in_a_batch(name):
    policy = method(name).policy
    q, k, v = qkv(layers=3)
    weight = output()[0].unflatten(1, (H, D)).permute(1, 2, 0)

    def view(rows):
        return LayerView(
            index=1,
            layers=2,
            keep=24,
            tokens=N,
            queries=q[rows],
            keys=k[rows],
            values=v[rows],
            positions=torch.arange(N).int().expand(len(q[rows]), K, N),
            scale=D**-0.5,
            carried=torch.zeros(len(q[rows]), K, N),
            output=lambda: weight,
            factor=lambda: output_factor(weight),
            rotate=rope,
        )

    def score(rows):
        seen = view(rows)
        if policy.foresees:
            states = hidden(3)[rows], seen.keys, seen.values
            seen = dataclasses.replace(seen, carried=policy.foresee(1, *states))
        if policy.carries:
            seen = dataclasses.replace(seen, carried=policy.observe(seen))
        return policy.score(seen)

    batch = score(slice(0, 3))
    assert batch.dtype == torch.float32
    assert batch.shape[:2] == (3, K)
    assert batch.shape[2] in (N, N - policy.recent(24))
    for row in range(3):
        torch.testing.assert_close(
            score(slice(row, row + 1)), batch[row : row + 1], rtol=1e-5, atol=1e-6
        )


def test_every_policy_file_is_used_by_a_method():
    used = {type(entry.policy).__module__ for entry in kvtrim.METHODS.values()}
    files = {f"kvtrim.methods.policies.{m.name}" for m in pkgutil.iter_modules(policies.__path__)}
    helpers = {"base", "ops", "output"}
    assert files - {f"kvtrim.methods.policies.{name}" for name in helpers} == used


def test_a_policy_file_names_its_source():
    for module in pkgutil.iter_modules(policies.__path__):
        loaded = importlib.import_module(f"kvtrim.methods.policies.{module.name}")
        if module.name not in ("base", "ops", "output"):
            assert "Paper:" in loaded.__doc__, module.name


def test_a_policy_must_say_which_queries_it_needs():
    class Silent(Policy):
        def score(self, layer):
            return layer.keys[..., 0]

    with pytest.raises(TypeError, match="lookback"):
        Silent()


@pytest.mark.parametrize("name", METHODS)
def test_every_preset_can_be_built_and_selects(name):
    for preset in find(name).presets:
        chosen = find(name, preset=preset, **table(name, layers=2))
        keep = 80
        q, k, v = (t.repeat(1, 1, 3, 1) for t in qkv())
        given = {"output": output(), "hidden": hidden(tokens=3 * N), "rotate": rope}
        heads = [h for layer in kvtrim.select(chosen, q, k, v, keep=keep, **given) for h in layer]
        assert all(head.tolist() == sorted({*head.tolist()} & {*range(3 * N)}) for head in heads)
        mean = sum(map(len, heads)) / len(heads)
        if name == "pyramidinfer" or (name, preset) == ("knorm", "kvf"):  # spares two layers
            assert mean == 3 * N
        else:
            assert 59 <= mean <= 89, (preset, mean)


@pytest.mark.parametrize("name", METHODS)
def test_heads_that_hold_their_window_alone_are_scored(name):
    """Nothing competes there; with budgets of their own, heads come to that."""
    policy = method(name).policy
    window = policy.recent(10**6)
    if not 0 < window < N or policy.lookback() > window:
        return
    q, k, v = (each[:1, :, -window:] for each in qkv(layers=1))
    view = LayerView(
        index=0,
        layers=1,
        keep=window,
        tokens=N,
        queries=q,
        keys=k,
        values=v,
        positions=torch.arange(N - window, N).expand(1, K, -1),
        scale=D**-0.5,
        carried=torch.zeros(1, K, window),
        hidden=hidden(1, window),
        output=lambda: output(1)[0].unflatten(1, (H, D)).permute(1, 2, 0),
        factor=lambda: output_factor(output(1)[0].unflatten(1, (H, D)).permute(1, 2, 0)),
        rotate=rope,
        decoding=True,
    )
    assert policy.score(view).shape[-1] in (0, window)
