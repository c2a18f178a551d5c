"""CircuitKV: recorded cases, the worked example, plain loops, and heads of different length."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import golden
import kvtrim
import oracles
from kvtrim.errors import BudgetError, UsageError
from kvtrim.methods.policies import circuitkv
from kvtrim.methods.policies.circuitkv import CircuitKV
from kvtrim.methods.selection import select
from kvtrim.methods.settings import find
from views import view

CASES = golden.cases("circuitkv")
H, K, D, N = 6, 2, 8, 40


def random_qk(seed=3, n=N, heads=H, kv_heads=K):
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(heads, n, D, generator=draw) * 2
    return q, torch.randn(kv_heads, n, D, generator=draw)


def random_surface(seed, n, window, sunk=0.0):
    """Attention of the last `window` queries [W, n], float64, with 4 sinks of raised logits."""
    draw = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(window, n, generator=draw, dtype=torch.float64)
    logits[:, :4] += sunk
    return logits.masked_fill(~oracles.causal(n)[n - window :], -torch.inf).softmax(-1)


def fast(surface, sinks, steps, temperature=1.0):
    lengths = torch.tensor([surface.shape[1]])
    return circuitkv.visits(surface[None], lengths, sinks, steps, temperature)[0]


# The oracle: every state and every transition written out


def transitions(surface, sinks, temperature=1.0):
    """The n x n matrix of step probabilities among transient states, as nested lists."""
    window, n = surface.shape
    first = n - window
    rows = surface.tolist()
    pull = [max(sum(row[j] for row in rows), 1e-6) ** (1 / temperature) for j in range(first)]
    rows = [[weight ** (1 / temperature) for weight in row] for row in rows]
    matrix = [[0.0] * n for _ in range(n)]
    for i in range(sinks, n):
        weights = rows[i - first] if i >= first else pull[:i] + [0.0] * (n - i)
        total = sum(weights)
        for j in range(sinks, n):
            matrix[i][j] = weights[j] / total if total else 0.0
    return matrix


def visits_by_loops(surface, sinks, steps, temperature=1.0):
    """Expected visits from the newest slot and from anywhere, step by step through the matrix."""
    n = surface.shape[1]
    matrix = transitions(surface, sinks, temperature)
    out = []
    newest = [float(i == n - 1) for i in range(n)]
    anywhere = [1 / (n - sinks) if i >= sinks else 0.0 for i in range(n)]
    for now in (newest, anywhere):
        total = list(now)
        for _ in range(steps):
            now = [sum(now[i] * matrix[i][j] for i in range(n)) for j in range(n)]
            total = [a + b for a, b in zip(total, now, strict=True)]
        share = 0.01 * sum(total)
        out.append([share] * sinks + total[sinks:])
    return torch.tensor(out, dtype=torch.float64)


def places(values):
    """Ascending rank of each value over the highest rank, ties in order."""
    order = sorted(range(len(values)), key=lambda i: (float(values[i]), i))
    return [order.index(i) / (len(values) - 1) for i in range(len(values))]


def better(both):
    return torch.tensor([max(pair) for pair in zip(*map(places, both), strict=True)])


def smoothed(values, kernel, sigma):
    """Gaussian mean of a list, zeros beyond its ends."""
    bell = [math.exp(-0.5 * ((i - kernel // 2) / sigma) ** 2) for i in range(kernel)]
    at = dict(enumerate(values))
    return [
        sum(b / sum(bell) * at.get(j + i - kernel // 2, 0.0) for i, b in enumerate(bell))
        for j in range(len(values))
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 30),
    st.integers(1, 8),
    st.integers(0, 4),
    st.integers(0, 12),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.integers(0, 99),
)
def test_visits_equal_the_dense_chain(n, window, sinks, steps, temperature, seed):
    window, sinks = min(window, n), min(sinks, n - 1)
    surface = random_surface(seed, n, window)
    want = visits_by_loops(surface, sinks, steps, temperature)
    got = fast(surface, sinks, steps, temperature)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)


def test_chains_of_different_length_equal_each_alone():
    surface = torch.zeros(3, 4, 30, dtype=torch.float64)
    lengths = [30, 9, 17]
    for chain, n in enumerate(lengths):
        surface[chain, :, :n] = random_surface(chain, n, 4)
    got = circuitkv.visits(surface, torch.tensor(lengths), 2, 10)
    for chain, n in enumerate(lengths):
        torch.testing.assert_close(got[chain, :, :n], fast(surface[chain, :, :n], 2, 10))
        assert float(got[chain, :, n:].abs().sum()) == 0


def test_many_steps_reach_the_closed_form_and_ten_are_enough():
    n, window, sinks = 900, 8, 4
    surface = random_surface(7, n, window, sunk=5.0)
    first = n - window
    matrix = torch.tensor(transitions(surface, sinks), dtype=torch.float64)
    start = torch.zeros(n, 2, dtype=torch.float64)
    start[-1, 0] = 1
    start[sinks:, 1] = 1 / (n - sinks)
    forever = torch.linalg.solve(torch.eye(n).double() - matrix.T, start).T
    got = fast(surface, sinks, 400)
    torch.testing.assert_close(got[:, sinks:], forever[:, sinks:], rtol=1e-10, atol=1e-14)
    pull = surface.sum(0)[:first].clamp(min=1e-6)
    rho = pull / pull.cumsum(0)
    steered = forever[0, first:] @ surface[:, :first]
    for j in (sinks, 100, first - 1):
        want = steered[j] + rho[j] * steered[j + 1 :].sum()
        assert float(forever[0, j]) == pytest.approx(float(want), rel=1e-9)
    short = fast(surface, sinks, 10)[:, sinks:]
    error = (short - forever[:, sinks:]).abs().sum(1) / forever[:, sinks:].sum(1)
    assert float(error.max()) < 1e-5


# The worked example of the specification

SURFACE = torch.tensor(
    [
        [0.30, 0.05, 0.10, 0.05, 0.20, 0.10, 0.20, 0],
        [0.20, 0.10, 0.05, 0.15, 0.05, 0.25, 0.10, 0.10],
    ],
    dtype=torch.float64,
)


def test_worked_visits():
    near, hubs = fast(SURFACE, 1, 10)
    want = [0.023649, 0.260684, 0.172309, 0.248611, 0.141667, 0.291667, 0.138889, 1.111111]
    assert near.tolist() == pytest.approx(want, abs=1e-6)
    want = [0.016625, 0.339438, 0.277406, 0.255159, 0.230952, 0.202381, 0.198413, 0.158730]
    assert hubs.tolist() == pytest.approx(want, abs=1e-6)
    torch.testing.assert_close(fast(SURFACE, 1, 50), fast(SURFACE, 1, 10), rtol=1e-6, atol=1e-7)


def test_worked_slopes():
    pull = SURFACE.sum(0)[:6]
    assert pull.tolist() == pytest.approx([0.5, 0.15, 0.15, 0.2, 0.25, 0.35])
    rho = pull / pull.cumsum(0)
    assert rho.tolist() == pytest.approx([1, 0.230769, 0.1875, 0.2, 0.2, 0.21875], abs=1e-6)


def test_worked_ranks():
    both = fast(SURFACE, 1, 10)[None]
    placed = circuitkv.ranks(both, torch.tensor([8]))[0] * 7
    assert placed[0].round().tolist() == [0, 5, 3, 4, 2, 6, 1, 7]
    assert placed[1].round().tolist() == [0, 7, 6, 5, 4, 3, 2, 1]
    assert placed.amax(0).round().tolist() == [0, 7, 6, 5, 4, 6, 2, 7]


@pytest.mark.parametrize(
    ("keep", "want"),
    [(5, [0, 1, 2, 6, 7]), (6, [0, 1, 2, 5, 6, 7]), (7, [0, 1, 2, 3, 5, 6, 7])],
)
def test_worked_selections(keep, want):
    q = torch.zeros(1, 8, 2)
    q[0, 6:] = torch.eye(2)  # query i of the window reads coordinate i of the keys
    k = SURFACE.clamp(min=1e-9).log().T.float()[None]
    kept = kvtrim.select("circuitkv", q, k, k, keep=keep, window=2, sinks=1, scale=1.0)
    assert kept[0][0].tolist() == want


# Recorded cases


def policy_of(case):
    names = ("window", "sinks", "steps", "temperature")
    return CircuitKV(**{name: case.params[name] for name in names})


def test_every_recorded_case_is_covered():
    assert len(CASES) == 11
    assert [case.number for case in CASES if too_small(case)] == [8]


def too_small(case):
    return case.params["capacity"] <= case.params["window"] + case.params["sinks"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_it_keeps_the_recorded_tokens(case):
    policy, keep = policy_of(case), case.params["capacity"]
    if too_small(case):  # the reference keeps window and sinks alone, kvtrim asks for more room
        with pytest.raises(BudgetError, match="leaves nothing to choose"):
            kvtrim.select("circuitkv", *case.qkv(), keep=keep)
        (q,), (k,), _ = case.qkv()
        scores = policy.score(view(q, k))
        forced = {"sinks": policy.sinks, "recent": policy.window}
        slots = select(scores, torch.zeros(1, 2).long(), k.shape[1], **forced).slots
        assert case.differing_heads(list(slots[0])) == []
        return
    settings = dataclasses.asdict(policy)
    kept = kvtrim.select("circuitkv", *case.qkv(), keep=keep, **settings)
    assert case.differing_heads(kept[0]) == []


@pytest.mark.parametrize(
    "case", [case for case in CASES if "scores" in case], ids=lambda case: case.id
)
def test_visits_and_scores_are_the_recorded_ones(case):
    (q,), (k,), _ = case.qkv()
    policy, seen = policy_of(case), view(q, k)
    weights = oracles.window_weights(q, k, policy.window, seen.scale)
    both = policy.visits(weights[None], torch.tensor([k.shape[1]]))[0]
    both = both / both.amax(dim=-1, keepdim=True)
    torch.testing.assert_close(both[0].float(), case.tensor("qi_scores"), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(both[1].float(), case.tensor("hi_scores"), rtol=1e-4, atol=1e-7)
    ranks = torch.stack([policy.score(seen)[0, 0], case.tensor("scores")]) * (k.shape[1] - 1)
    ranks = ranks[:, policy.sinks :].round()  # sinks tie among themselves
    assert float((ranks[0] - ranks[1]).abs().max()) <= 1, "neighbours that nearly tie may swap"
    assert int((ranks[0] != ranks[1]).sum()) <= 2


# Presets


def test_scores_equal_the_loops():
    q, k = random_qk()
    weights = oracles.window_weights(q, k, 5, D**-0.5)
    want = better(visits_by_loops(weights.amax(0), 3, 10).tolist())
    got = CircuitKV(window=5, sinks=3).score(view(q, k))[0]
    assert torch.equal(got, want.expand(K, N))


def test_head_shared_equals_the_loops():
    q, k = random_qk()
    k[0, 0] = 9 * q[0, -1] / q[0, -1].norm()  # a sink for some of the heads
    q[0, -5:] = q[0, -1]
    window, sinks, few = 5, 3, 2
    weights = oracles.window_weights(q, k, window, D**-0.5)
    entropy, outside = [], []
    for head in weights.clamp(min=1e-8).tolist():
        rows = [-sum(a * math.log(a) for a in row) for row in head]
        entropy.append(sum(rows) / window)
    for head in weights.tolist():
        outside.append(sum(sum(row[sinks:]) for row in head) / window >= 0.5)
    assert 0 < sum(outside) < H, "the example has heads of both kinds"
    clear = sorted(range(H), key=lambda h: entropy[h])[:few]
    near = visits_by_loops(weights[clear].amax(0), sinks, 10)[0].tolist()
    hubs = visits_by_loops(weights[torch.tensor(outside)].mean(0), sinks, 10)[1].tolist()
    want = better([smoothed(near, 3, 0.5), smoothed(hubs, 5, 1.0)])
    policy = CircuitKV(window=window, surface="split", clearest=few, sinks=sinks)
    assert torch.equal(policy.score(view(q, k))[0], want.expand(K, N))


def test_heads_that_all_look_at_the_sinks_are_all_averaged():
    weights = torch.zeros(1, 3, 2, 6)
    weights[..., 0] = 0.9
    weights[:, torch.arange(3), :, torch.arange(3) + 2] = 0.1
    mean = circuitkv.outward(weights, sinks=1)
    torch.testing.assert_close(mean[0, :, 2:5], torch.full((2, 3), 0.1 / 3))


def alone_by_loops(heads, sinks):
    """Scores before the window of each head by itself, from its attention [W][its slots]."""
    entropy = [-sum(max(a, 1e-8) * math.log(max(a, 1e-8)) for a in rows[-1]) for rows in heads]
    span = max(entropy) - min(entropy)
    out = []
    for h, rows in enumerate(heads):
        window, n, newest = len(rows), len(rows[-1]), rows[-1]
        first, walked = n - window, n - sinks
        twice = [sum(newest[first + w] * rows[w][j] for w in range(window)) for j in range(n)]
        early = [newest[j] * (1 + (walked - (j - sinks)) / walked) for j in range(n)]
        near = smoothed([a + b for a, b in zip(newest, twice, strict=True)], 5, 1.0)
        hubs = smoothed(early, 5, 1.0)
        sharp = 1 - (entropy[h] - min(entropy)) / span
        ranks = zip(places(near[:first]), places(hubs[:first]), strict=True)
        out.append(torch.tensor([sharp * x + (1 - sharp) * y for x, y in ranks]))
    return out


def test_head_perhead_equals_the_loops():
    q, k = random_qk()
    window, sinks = 5, 3
    weights = oracles.window_weights(q, k, window, D**-0.5).tolist()
    want = torch.stack(alone_by_loops(weights, sinks))
    policy = CircuitKV(window=window, surface="own", sinks=sinks)
    every = k.repeat_interleave(H // K, dim=0)
    got = policy.score(view(q, every))[0, :, : N - window]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    shared = policy.score(view(q, k))[0, :, : N - window]
    mean = want.view(K, H // K, -1).mean(1)
    torch.testing.assert_close(shared, mean, rtol=1e-4, atol=1e-5)


def test_per_head_preset_stores_query_heads_and_lets_them_differ():
    q, k = random_qk(n=200)
    kept = kvtrim.select("circuitkv", q, k, k, keep=80, preset="head-perhead")[0]
    assert len(kept) == H
    assert len({tuple(head.tolist()) for head in kept}) > 1
    for head in kept:
        assert len(head) == 80
        assert {0, 1, 2, 3, *range(136, 200)} <= set(head.tolist())


@pytest.mark.parametrize("preset", ["v4.3", "head-shared"])
def test_one_set_is_shared_by_all_heads_and_their_order_does_not_matter(preset):
    q, k = random_qk(n=120, kv_heads=3)
    kept = kvtrim.select("circuitkv", q, k, k, keep=80, preset=preset)[0]
    turned = kvtrim.select("circuitkv", q.flip(0), k.flip(0), k, keep=80, preset=preset)[0]
    assert len({tuple(head.tolist()) for head in (*kept, *turned)}) == 1


# Heads of different length, precision, memory


@pytest.mark.parametrize("surface", ["max", "split"])
def test_heads_of_different_length_walk_apart(surface):
    q, k = random_qk()
    lengths = torch.tensor([[N, 23]])
    dirty = k.clone()
    dirty[1, 23:] = 1e4
    policy = CircuitKV(window=4, surface=surface, clearest=2)
    got = policy.score(view(q[:, -4:], dirty, lengths=lengths))[0]
    for head, length in enumerate((N, 23)):
        own = q[3 * head : 3 * head + 3, -4:]
        want = policy.score(view(own, k[head : head + 1, :length]))[0, 0]
        assert torch.equal(got[head, :length], want)


def test_heads_by_themselves_may_have_different_lengths():
    q, k = random_qk(heads=2)
    q, dirty = q[:, -4:], k.clone()
    dirty[1, 23:] = 1e4
    seen = view(q, dirty, lengths=torch.tensor([[N, 23]]))
    got = CircuitKV(window=4, surface="own").score(seen)[0]
    placed = [torch.cat([torch.zeros(1, n - 4, D), q[h : h + 1]], 1) for h, n in ((0, N), (1, 23))]
    heads = [
        oracles.window_weights(own, k[h : h + 1, : own.shape[1]], 4, D**-0.5)[0].tolist()
        for h, own in enumerate(placed)
    ]
    for head, want in enumerate(alone_by_loops(heads, 4)):
        torch.testing.assert_close(got[head, : len(want)], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", ["v4.3", "head-shared", "head-perhead"])
def test_half_precision_is_scored_in_full(preset):
    policy = find("circuitkv", preset=preset, window=8).policy
    q, k = random_qk()
    for dtype in (torch.bfloat16, torch.float16):
        low = view(q.to(dtype), k.to(dtype))
        same = view(q.to(dtype).float(), k.to(dtype).float())
        assert policy.score(low).dtype == torch.float32
        assert torch.equal(policy.score(low), policy.score(same))


class Largest(TorchDispatchMode):
    """Remembers the most numbers that any tensor made inside it has."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else (out,)
        sizes = [x.numel() for x in made if isinstance(x, torch.Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return out


@pytest.mark.parametrize("preset", ["v4.3", "head-shared", "head-perhead"])
def test_no_tensor_grows_with_the_square_of_the_prompt(preset):
    n, window = 3000, 8
    q, k = random_qk(n=n)
    policy = find("circuitkv", preset=preset, window=window).policy
    with Largest() as largest:
        policy.score(view(q, k))
    assert largest.numbers <= H * window * n


def test_a_cold_temperature_is_refused():
    with pytest.raises(UsageError, match=r"temperature=0.0: expected float .above 0"):
        CircuitKV(temperature=0.0)


def test_a_head_that_holds_less_than_the_window_hops_over_what_it_holds():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(1, 2, 8, 6, generator=generator).softmax(dim=-1)
    got = circuitkv.alone(weights, torch.full((1, 2), 6), 1)
    seen = weights[:, :, 2:]  # the queries of the two slots that are gone lead nowhere
    assert torch.equal(got, circuitkv.alone(seen, torch.full((1, 2), 6), 1))
