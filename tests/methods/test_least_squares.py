"""Refitted values and biases: the formulas in float64 loops, and what is promised of them."""

import itertools
from math import log

import pytest
import torch

from kvtrim.errors import UsageError
from kvtrim.methods.refit import REFITS, LeastSquares, aim_of

K, Q, N, D, E = 2, 120, 40, 6, 5
SCALE = D**-0.5


def drawn(seed=0):
    draw = torch.Generator().manual_seed(seed)
    queries, keys = torch.randn(K, Q, D, generator=draw), torch.randn(K, N, D, generator=draw)
    return 2 * queries, keys, torch.randn(K, N, E, generator=draw)


def kept_of(tensors, lengths):
    """The first entries of every head, padded with rubbish."""
    width = max(lengths)
    found = torch.full((K, width, tensors.shape[-1]), 1e4)
    for head, count in enumerate(lengths):
        found[head, :count] = tensors[head, :count]
    return found


def weights_by_hand(queries, keys, bias=None, softcap=None):
    """Softmax weights of one head, float64, one pair at a time."""
    rows = []
    for query in queries.double():
        logits = torch.stack([key @ query * SCALE for key in keys.double()])
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        rows.append((logits if bias is None else logits + bias).softmax(0))
    return torch.stack(rows)


def held_out(count=Q):
    return torch.tensor([at // 8 % 5 == 4 for at in range(count)])


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_full_cache_answers_as_attention_does(softcap):
    queries, keys, values = drawn()
    aim = aim_of(queries, keys, values, SCALE, softcap)
    for head in range(K):
        weights = weights_by_hand(queries[head], keys[head], softcap=softcap)
        answer = weights @ values[head].double()
        torch.testing.assert_close(aim.out[head].double(), answer, rtol=1e-4, atol=1e-5)
        logits = queries[head].double() @ keys[head].double().T * SCALE
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        mass = logits.logsumexp(-1)
        torch.testing.assert_close(aim.lse[head].double(), mass, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [(10, 10), (13, 5), (N, 7)])
def test_values_are_those_of_the_best_ridge_for_each_head(lengths):
    queries, keys, values = drawn(1)
    aim, refit = aim_of(queries, keys, values, SCALE), LeastSquares()
    given = kept_of(keys, lengths), kept_of(values, lengths), torch.tensor([lengths])
    found = refit.fit(aim, *given, SCALE, None)
    assert found.bias is None
    for head, count in enumerate(lengths):
        old, best, least = values[head, :count].double(), None, None
        weights = weights_by_hand(queries[head], keys[head, :count])
        gap = aim.out[head].double() - weights @ old
        own = held_out()
        gram = weights[~own].T @ weights[~own]
        for ridge in (None, *refit.ridges):
            change = torch.zeros_like(old)
            if ridge is not None:
                lifted = gram + ridge * gram.diagonal().mean() * torch.eye(count)
                change = torch.linalg.solve(lifted, weights[~own].T @ gap[~own])
            error = float(((gap - weights @ change)[own] ** 2).sum())
            if least is None or error < least:
                best, least = old + change, error
        new = found.values[head, :count].double()
        torch.testing.assert_close(new, best, rtol=2e-3, atol=2e-3)


def test_many_entries_and_few_queries_have_the_same_solution():
    """By way of the smaller Gram matrix."""
    queries, keys, values = drawn(2)
    few = queries[:, :45]
    aim = aim_of(few, keys, values, SCALE)
    lengths = (38, 37)
    given = kept_of(keys, lengths), kept_of(values, lengths), torch.tensor([lengths])
    found = LeastSquares(ridges=(0.1,)).fit(aim, *given, SCALE, None)
    own = held_out(45)
    for head, count in enumerate(lengths):
        weights = weights_by_hand(few[head], keys[head, :count])
        gap = aim.out[head].double() - weights @ values[head, :count].double()
        gram = weights[~own].T @ weights[~own]
        lifted = gram + 0.1 * gram.diagonal().mean() * torch.eye(count)
        change = torch.linalg.solve(lifted, weights[~own].T @ gap[~own])
        if float(((gap - weights @ change)[own] ** 2).sum()) >= float((gap[own] ** 2).sum()):
            change = torch.zeros_like(change)
        new = found.values[head, :count].double()
        torch.testing.assert_close(
            new, values[head, :count].double() + change, rtol=2e-3, atol=2e-3
        )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_on_held_out_queries_it_is_never_worse_than_nothing(bias, seed):
    queries, keys, values = drawn(seed)
    values = values * torch.rand(K, N, 1, generator=torch.Generator().manual_seed(seed)) ** 4
    aim, lengths = aim_of(queries, keys, values, SCALE), (12, 3)
    given = kept_of(keys, lengths), kept_of(values, lengths), torch.tensor([lengths])
    found = LeastSquares(bias=bias).fit(aim, *given, SCALE, None)
    own = held_out()
    for head, count in enumerate(lengths):
        plain = weights_by_hand(queries[head], keys[head, :count]) @ values[head, :count].double()
        extra = found.bias[head, :count].double() if bias else None
        new = weights_by_hand(queries[head], keys[head, :count], extra)
        new = new @ found.values[head, :count].double()
        errors = [float(((aim.out[head] - x)[own] ** 2).sum()) for x in (plain, new)]
        assert errors[1] <= errors[0] * (1 + 1e-4)


def test_noise_is_not_fitted():
    """Where what is asked of an entry has nothing to do with what is held out, nothing changes."""
    queries, keys, values = drawn(5)
    aim = aim_of(queries, keys, values, SCALE)
    out = aim.out.clone()
    out[:, ~held_out()] += 50 * torch.randn(out[:, ~held_out()].shape)
    aim = type(aim)(aim.queries, out, aim.lse)
    found = LeastSquares().fit(aim, keys, values, torch.tensor([[N, N]]), SCALE, None)
    torch.testing.assert_close(found.values, values)


def test_biases_give_what_stays_the_mass_that_all_had():
    queries, keys, values = drawn(3)
    keys = torch.cat([keys[:, :20], keys[:, :20]], dim=1)  # every entry twice
    aim = aim_of(queries, keys, values, SCALE)
    given = keys[:, :20], values[:, :20], torch.tensor([[20, 20]])
    found = LeastSquares(bias=True).fit(aim, *given, SCALE, None)
    for head in range(K):
        logits = queries[head].double() @ keys[head, :20].double().T * SCALE
        mass = (logits + found.bias[head].double()).logsumexp(-1)
        torch.testing.assert_close(mass, aim.lse[head].double(), rtol=0.05, atol=0.05)
    assert float(found.bias.mean()) == pytest.approx(log(2), abs=0.1)


def test_weights_are_the_nonnegative_ones_of_least_squares():
    """On two entries, beside every weight of a fine grid."""
    from kvtrim.methods.refit.least_squares import _nonnegative

    draw = torch.Generator().manual_seed(4)
    shares = torch.rand(30, 2, generator=draw) * torch.tensor([1.0, 0.05])
    for ridge in (1e-4, 0.1, 3.0):
        found = _nonnegative(shares, ridge)
        unit = ridge * shares.square().sum(dim=0).mean()

        def cost(weight, unit=unit):
            weight = torch.tensor(weight)
            return float(((shares @ weight - 1) ** 2).sum() + unit * ((weight - 1) ** 2).sum())

        grid = [x / 20 for x in range(80)]
        best = min(cost(pair) for pair in itertools.product(grid, grid))
        assert found.min() >= 0 and cost(found.tolist()) <= best * 1.001 + 1e-6


def test_what_makes_no_sense_is_refused():
    for wrong in ({"queries": 10}, {"behind": -1}, {"ridges": ()}, {"ridges": (0.0,)}):
        with pytest.raises(UsageError):
            LeastSquares(**wrong)
    assert REFITS["values+bias"]().biases and not REFITS["values"]().biases
    assert not REFITS["none"]().changes
