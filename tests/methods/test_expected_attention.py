"""ExpectedAttention: worked examples, the plain loop, the model's own projections beside it."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import kvtrim
import loops
import models
from kvtrim.methods.policies.expected_attention import ExpectedAttention
from kvtrim.methods.settings import find
from views import rope, view

H, K, D, N = 4, 2, 6, 24


def given(seed=0, n=N):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(h, n, D, generator=draw) for h in (H, K, K)]


def seen(q, k, v, **options):
    return view(q, k, v, **{"rotate": rope, **options})


@pytest.mark.parametrize(
    "settings",
    [{}, {"covariance": False}, {"value_norms": False}, {"eps": 0.3, "future": 3}, {"sinks": 0}],
)
def test_scores_are_those_of_the_loop(settings):
    q, k, v = given()
    got = ExpectedAttention(**{"future": 40} | settings).score(seen(q, k, v))[0]
    doubles = (each.double() for each in (q, k, v))
    expected = torch.tensor(loops.expected_attention(*doubles, **{"future": 40} | settings))
    torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-6)


def test_equal_queries_are_expected_to_look_as_they_do_now():
    """Without RoPE, one and the same query everywhere: nothing varies, and the mean is it."""
    q, k, v = given(seed=1)
    q = q[:, :1].expand(-1, N, -1)
    still = ExpectedAttention(value_norms=False, sinks=0)
    got = still.score(seen(q, k, v, rotate=lambda vectors, by: vectors))[0]
    weights = (q[:, -1:] @ k.repeat_interleave(2, 0).mT * D**-0.5).softmax(-1)[:, 0]
    torch.testing.assert_close(got, weights.unflatten(0, (K, 2)).mean(1), rtol=1e-4, atol=1e-6)


def test_a_key_along_which_queries_vary_is_worth_more():
    """s^2 k C k / 2 is worked out by hand: queries (1, +-2), keys (1, 0) and (0, 1), s = 1."""
    q = torch.tensor([[[1.0, 2.0], [1.0, -2.0]]])
    k = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    policy = ExpectedAttention(value_norms=False, sinks=0)
    got = policy.score(seen(q, k, k, scale=1.0, rotate=lambda vectors, by: vectors))[0, 0]
    # logits: 1 along the mean; 4 / 2 = 2 along the spread
    torch.testing.assert_close(got, torch.tensor([1.0, 2.0]).softmax(0))


def test_shorter_heads_and_queries_that_a_batch_padded_score_as_alone():
    q, k, v = given(seed=2)
    policy = ExpectedAttention(future=20)
    ragged = policy.score(seen(q, k, v, lengths=torch.tensor([[N, N - 5]])))[0]
    shorter = policy.score(seen(q, k[:, : N - 5], v[:, : N - 5], tokens=N))[0]
    whole = policy.score(seen(q, k, v))[0]
    torch.testing.assert_close(ragged[0], whole[0])
    torch.testing.assert_close(ragged[1, : N - 5], shorter[1])
    padded = torch.cat([torch.zeros(H, 7, D), q], dim=1)
    torch.testing.assert_close(policy.score(seen(padded, k, v))[0], whole)
    torch.testing.assert_close(policy.score(seen(padded, k, v, decoding=True))[0], whole)


def test_what_generated_tokens_ask_counts_once_text_is_generated():
    q, k, v = given(seed=3)
    policy = ExpectedAttention(remembered=5)
    got = policy.score(seen(q, k, v, decoding=True))[0]
    torch.testing.assert_close(got, policy.score(seen(q[:, -5:], k, v, decoding=True))[0])
    assert not torch.allclose(got, policy.score(seen(q, k, v))[0])


def test_the_models_own_queries_before_rope_give_the_same(llama):
    """Turning queries back is the projection before RoPE, which this works out anew."""
    ids, states = models.prompt(40), {}
    hooks = [
        block.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs, at=at: states.__setitem__(at, kwargs["hidden_states"][0]),
            with_kwargs=True,
        )
        for at, block in enumerate(llama.model.layers)
    ]
    cache = kvtrim.Cache(llama, "expected-attention", 20, future=30, eps=0.02)
    views = []
    policy = cache.method.policy
    score = ExpectedAttention.score
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), kvtrim.attach(llama):
        patch.setattr(
            ExpectedAttention,
            "score",
            lambda self, layer: views.append(layer) or score(self, layer),
        )
        llama(ids, past_key_values=cache)
    for hook in hooks:
        hook.remove()
    rotary = llama.model.rotary_emb
    for layer, state in zip(views, (states[at] for at in sorted(states)), strict=True):
        block = llama.model.layers[layer.index].self_attn
        width = block.head_dim
        before = (state @ block.q_proj.weight.T).unflatten(-1, (-1, width)).transpose(0, 1)
        before = before[:, policy.sinks :].double()
        where = torch.arange(40, 40 + policy.future)[None]
        cos, sin = (each[0].double() for each in rotary(state.double(), where))
        basis = torch.eye(width).double()
        half = torch.cat([-basis[:, width // 2 :], basis[:, : width // 2]], dim=-1)
        turn = (basis[:, None] * cos + half[:, None] * sin).mean(dim=1)
        mean = before.mean(1) @ turn
        apart = (before - before.mean(1, keepdim=True)) @ turn
        keys = layer.keys[0].double().repeat_interleave(len(before) // len(layer.keys[0]), 0)
        logits = (keys @ mean[..., None])[..., 0] * layer.scale
        logits += ((keys @ apart.mT) ** 2).mean(-1) * layer.scale**2 / 2
        expected = logits[:, policy.sinks :].softmax(-1)
        expected = expected.unflatten(0, (len(layer.keys[0]), -1)).mean(1)
        sizes = layer.values[0, :, policy.sinks :].double().norm(dim=-1)
        got = score(policy, layer)[0, :, policy.sinks :]
        torch.testing.assert_close(got.double(), (expected + policy.eps) * sizes)


def test_it_says_what_it_needs_and_what_it_does_not_go_with():
    q, k, v = given()
    with pytest.raises(kvtrim.KvtrimError, match=r"select\(\.\.\., rotate=\.\.\.\)"):
        kvtrim.select("expected-attention", q, k, v, keep=12)
    for settings in ({"positions": "rolled"}, {"propagation": "token-selective"}):
        with pytest.raises(kvtrim.KvtrimError, match="turns queries from where they were read"):
            kvtrim.select("expected-attention", q, k, v, keep=12, **settings)
    other = partial(rope, theta=5.0)
    kept = [
        kvtrim.select("expected-attention", q, k, v, keep=12, rotate=how) for how in (rope, other)
    ]
    assert [a.tolist() for a in kept[0][0]] != [a.tolist() for a in kept[1][0]]


def test_a_layer_without_rotation_is_refused():
    layer = replace(seen(*given()), rotate=None)
    with pytest.raises(kvtrim.KvtrimError, match="rotary embedding"):
        ExpectedAttention().score(layer)


@pytest.mark.parametrize(
    "settings", [{}, {"budget": "global"}, {"budget": "global", "anew": True}]
)
@pytest.mark.parametrize("prompt", [20, 60], ids=["fits", "is cut"])
def test_no_more_queries_stay_than_those_that_speak_while_generating(llama, settings, prompt):
    """Before layers competed for the first time, too: their first cut while generating reads the
    same queries."""
    cache = kvtrim.Cache(llama, "expected-attention", 40, every=8, remembered=4, **settings)
    ids = models.prompt(prompt + 48)
    with torch.no_grad(), kvtrim.attach(llama):
        llama(ids[:, :prompt], past_key_values=cache)
        for at in range(prompt, prompt + 48):
            held = cache.session.state.layers
            assert [each.queries.shape[2] for each in held] == [4] * len(held)
            llama(ids[:, at : at + 1], past_key_values=cache)
    assert max(int(each.length.max()) for each in cache.session.state.stores()) < prompt + 48


def test_chunks_which_bound_memory_are_refused():
    """Every query of the prompt speaks, so that all of them would be held until its end."""
    with pytest.raises(kvtrim.KvtrimError, match="ExpectedAttention needs all of it"):
        find("expected-attention", chunks=True)
