"""A probe's attention on a CPU: its output, and the largest weights that come out of it."""

import pytest
import torch

from kvtrim.kernels import explicit, sdpa
from kvtrim.methods.policies import ops
from kvtrim.types import Noted
from views import view

B, K, G, D, Q, S = 2, 2, 3, 16, 11, 40


@pytest.fixture
def tensors():
    draw = torch.Generator().manual_seed(1)
    shapes = (B, K * G, Q, D), (B, K, S, D), (B, K, S, D)
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]


def slow(queries, keys, noted, scale, softcap):
    """Largest weights in float64, from the whole matrix of the noted slots and the own ones."""
    own = torch.arange(S - Q, S)
    held = keys[:, :, torch.cat([noted.slots, own])].repeat_interleave(G, dim=1)
    logits = queries @ held.transpose(-1, -2) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    ahead = torch.ones(Q, Q, dtype=torch.bool).triu(1)
    logits[..., len(noted.slots) :].masked_fill_(ahead, -torch.inf)
    weights = logits.softmax(dim=-1)[..., : len(noted.slots)]
    if noted.weights is not None:
        weights = weights * noted.weights[:, None, :, None]
    return weights.amax(dim=-2)


@pytest.mark.parametrize("block", [1, 2**18])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("slots", [[0, 1, 5, 6, 7, 28], [*range(S - Q)]])
def test_output_and_weights_are_those_of_the_slow_loops(
    tensors, monkeypatch, block, softcap, weighed, slots
):
    monkeypatch.setattr(explicit, "_ELEMENTS", block)
    queries, keys, values = tensors
    weights = torch.rand(B, Q, dtype=torch.float64) + 0.1 if weighed else None
    noted = Noted(torch.tensor(slots), weights)
    out, most = explicit.largest(queries, keys, values, noted, 0.25, softcap)
    want = sdpa.up_to(queries, keys, values, torch.arange(S - Q, S), 0.25, softcap)
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-9)
    expected = slow(queries, keys, noted, 0.25, softcap)
    torch.testing.assert_close(most, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_number_format(tensors, dtype):
    queries, keys, values = (each.to(dtype) for each in tensors)
    noted = Noted(torch.arange(4, 20))
    out, most = explicit.largest(queries, keys, values, noted, 0.25)
    exact = [each.double() for each in (queries, keys, values)]
    want = sdpa.up_to(*exact, torch.arange(S - Q, S), 0.25)
    close = {torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert out.dtype == dtype and most.dtype == torch.float32
    torch.testing.assert_close(out.double(), want, rtol=close, atol=close)
    expected = slow(*exact[:2], noted, 0.25, None).float()
    # some processors sum exponentials of 16-bit queries to four digits
    close = 1e-5 if dtype == torch.float32 else 2e-4
    torch.testing.assert_close(most, expected, rtol=close, atol=1e-7)


def test_values_of_another_width_than_keys(tensors):
    queries, keys, values = tensors
    noted = Noted(torch.arange(9))
    out, _ = explicit.largest(queries, keys, values[..., :5], noted, 0.25)
    want = sdpa.up_to(queries, keys, values[..., :5], torch.arange(S - Q, S), 0.25)
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-9)


def test_noted_slots_that_hardly_weigh_beside_the_others_keep_their_digits(tensors):
    queries, keys, values = tensors
    keys[:, :, 20:25] += 40 * queries.reshape(B, K, G, Q, D).mean(dim=(2, 3))[:, :, None]
    noted = Noted(torch.arange(6))
    given = [each.float() for each in (queries, keys, values)]
    _, most = explicit.largest(*given, noted, 4.0)
    expected = slow(given[0].double(), given[1].double(), noted, 4.0, None)
    torch.testing.assert_close(most.double(), expected, rtol=1e-4, atol=0)


def test_what_attention_noted_is_not_worked_out_again(tensors):
    queries, keys, _ = (each[0] for each in tensors)
    noted = Noted(torch.arange(3, 9))
    layer = view(queries, keys)
    want = ops.largest(layer, noted)
    torch.testing.assert_close(want, slow(queries[None], keys[None], noted, 0.25, None).float())
    there = torch.rand(1, K * G, 6)
    assert ops.largest(view(queries, keys, received=there), noted) is there
