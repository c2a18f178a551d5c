"""DefensiveKV: worked examples, and the plain loop beside it."""

from dataclasses import replace

import pytest
import torch

import loops
from kvtrim.methods.policies import defensive
from kvtrim.methods.policies.defensive import Defensive
from kvtrim.methods.policies.output import output_factor
from views import view

H, K, D, N, W = 4, 2, 8, 30, 6


def given(seed=0, n=N):
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(h, n, D, generator=draw) for h in (H, K, K))
    return q, k, v, torch.randn(12, H * D, generator=draw)


def seen(q, k, v, wo, **options):
    output = wo.unflatten(1, (H, D)).permute(1, 2, 0)
    made = {"output": lambda: output, "factor": lambda: output_factor(output)}
    return view(q, k, v, **made, **options)


@pytest.mark.parametrize("own", ["window", "before"])
@pytest.mark.parametrize("among", ["slots", "heads"])
@pytest.mark.parametrize(("mass", "keep"), [(0.9, 9), (0.9, 29), (0.6, 20), (0.0, 12)])
def test_scores_are_those_of_the_loop(own, among, mass, keep):
    q, k, v, wo = given()
    policy = Defensive(window=W, kernel=3, mass=mass, own=own, among=among)
    got = policy.score(seen(q, k, v, wo, keep=keep))[0]
    doubles = (each.double() for each in (q, k, v, wo))
    expected = loops.defensive(*doubles, keep, W, 3, mass, own, among)
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-4, atol=1e-7)


def test_what_one_query_asks_for_counts_as_much_as_what_all_ask_for(monkeypatch):
    weights = torch.tensor([[[[0.1, 0.0, 0.5, 0.0], [0.1, 0.6, 0.0, 0.0]]]])  # [1, H, W, N]
    monkeypatch.setattr(defensive.ops, "window_attention", lambda *_: weights)
    layer = view(torch.zeros(1, 6, 2), torch.zeros(1, 6, 2), torch.ones(1, 6, 2))
    layer = replace(layer, output=lambda: torch.ones(1, 2, 3), factor=lambda: torch.ones(1, 2, 2))
    policy = Defensive(window=2, kernel=1, mass=0.0)
    got = policy.score(layer)[0, 0] * 4  # all values alike: a quarter each
    mean = (0.1 + 0.6 + 0.5 + 0.0) / 4  # and nobody below it
    torch.testing.assert_close(got, torch.tensor([mean, 0.6, 0.5, mean]))


def test_what_is_looked_at_most_comes_before_large_values(monkeypatch):
    weights = torch.tensor([[[[0.1, 0.0, 0.5, 0.0], [0.1, 0.6, 0.0, 0.0]]]])
    monkeypatch.setattr(defensive.ops, "window_attention", lambda *_: weights)
    values = torch.tensor([4.0, 1.0, 2.0, 3.0, 9.0, 9.0])[None, :, None].expand(1, 6, 2)
    layer = view(torch.zeros(1, 6, 2), torch.zeros(1, 6, 2), values, keep=6)
    layer = replace(layer, output=lambda: torch.ones(1, 2, 3), factor=lambda: torch.ones(1, 2, 2))
    policy = Defensive(window=2, kernel=1, mass=0.0)
    plain = torch.tensor([0.3 * 4, 0.6 * 1, 0.5 * 2, 0.3 * 3]) / 10
    torch.testing.assert_close(policy.score(layer)[0, 0], plain)
    # The window pays .35 to itself. Mean attention .1 .3 .25 0 of .65: slot 1 holds .46 of it,
    # slots 1 and 2 .85; they come first as far as they lie before the one that reaches the mass.
    for mass, keep, first in ((0.8, 6, []), (0.9, 6, [1]), (1.0, 6, [1]), (1.0, 2, [])):
        got = replace(policy, mass=mass).score(replace(layer, keep=keep))[0, 0]
        expected = plain.clone()
        expected[first] = plain.max() * (1 + 0.3 / 0.65)
        torch.testing.assert_close(got, expected, msg=str((mass, keep)))


def test_heads_of_different_length_score_as_if_alone():
    q, k, v, wo = given(seed=1)
    lengths = [N, N - 7]
    layer = seen(q, k, v, wo, keep=15, lengths=torch.tensor([lengths]))
    policy = Defensive(window=W, kernel=3, mass=0.0)
    got = policy.score(layer)[0]
    for head, length in enumerate(lengths):
        part = slice(2 * head, 2 * head + 2)
        own = wo.unflatten(1, (H, D))[:, part].flatten(1)
        alone = [q[part, :], k[head : head + 1, :length], v[head : head + 1, :length]]
        alone[0] = alone[0][:, -W:]
        output = own.unflatten(1, (2, D)).permute(1, 2, 0)
        made = {"output": lambda o=output: o, "factor": lambda o=output: output_factor(o)}
        expected = policy.score(view(*alone, keep=15, **made))[0, 0]
        torch.testing.assert_close(got[head, : length - W], expected, rtol=1e-5, atol=1e-7)
