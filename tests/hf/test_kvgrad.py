"""KVgrad: gradients of the probe by finite differences, scores by loops, batches as alone."""

import copy

import pytest
import torch
from transformers import DynamicCache

import kvtrim
import models
import probes
from kvtrim.hf.cache import Cache
from kvtrim.hf.sensitivity import Sensitivity

CHUNK, KEEP, N, SINKS = 16, 14, 40, 4


def sensitivity_by_differences(model, ids, probe, layer, token, step=3e-3):
    """|d objective / d output of the attention|: every number of it is moved a little, both ways.

    The model is never attached; all moved copies are rows of one batch.
    """
    width = model.config.hidden_size
    moves = torch.cat([torch.eye(width), -torch.eye(width)]).to(model.dtype) * step
    rows, states = len(moves), []

    def move(module, args, out):
        moved = out[0].clone()
        moved[:, token] += moves
        return (moved, *out[1:])

    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids.expand(rows, -1), past_key_values=cache)
        hooks = [
            model.model.layers[layer].self_attn.register_forward_hook(move),
            model.model.layers[-1].register_forward_hook(
                lambda _, args, out: states.append(out[0] if isinstance(out, tuple) else out)
            ),
        ]
        model(probe.expand(rows, -1), past_key_values=cache)
        for hook in hooks:
            hook.remove()
    objective = states[0].square().sum(dim=(1, 2))
    return ((objective[:width] - objective[width:]) / (2 * step)).norm()


def gradients(model, ids, probe):
    cache = Cache(model, "full")
    with torch.no_grad(), kvtrim.attach(model):
        model(ids, past_key_values=cache)
        real = torch.ones_like(ids, dtype=torch.bool)
        given = {
            "input_ids": probe,
            "attention_mask": torch.ones(1, ids.shape[1] + probe.shape[1], dtype=torch.long),
            "position_ids": ids.shape[1] + torch.arange(probe.shape[1])[None],
        }
        return Sensitivity(cache, real).measure(given)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_finite_differences(frozen):
    model = copy.deepcopy(models.tiny("llama")).double().requires_grad_(not frozen)
    ids, probe = models.prompt(N), models.prompt(9, seed=5)
    found = gradients(model, ids, probe)
    assert found.shape == (len(model.model.layers), 1, 9)
    for layer, token in [(0, 0), (0, 7), (1, 3), (len(model.model.layers) - 1, 8)]:
        want = sensitivity_by_differences(model, ids, probe, layer, token)
        torch.testing.assert_close(
            found[layer, 0, token].double(), want, rtol=3e-4, atol=1e-4
        )  # norms are fp32
    assert all(each.grad is None for each in model.parameters())


def kept(model, method, ids, row=0, mask=None, **settings):
    cache = kvtrim.Cache(model, method, KEEP, chunk=CHUNK, **settings)
    given = {}
    if mask is not None:
        places = (mask.cumsum(dim=1) - 1).clamp(min=0)
        given = {"attention_mask": mask, "position_ids": places}
    with torch.no_grad(), kvtrim.attach(model):
        model(ids, past_key_values=cache, **given)
    return models.positions(cache, row)


def test_attention_counts_by_value_and_sensitivity(llama):
    ids = models.prompt(N)

    def weigh(run):
        probe = run()
        return {at: own[0] for at, own in enumerate(gradients(llama, ids, probe))}

    scores = probes.scores_by_hand(llama, ids, CHUNK, SINKS, weigh)[..., SINKS:].flatten()
    best = scores.topk((KEEP - SINKS) * scores.numel() // (N - SINKS)).indices.tolist()
    want = {(at // (N - SINKS), at % (N - SINKS) + SINKS) for at in best}
    found = kept(llama, "kvgrad", ids)
    heads = [head for layer in found for head in layer]
    assert {(at, p) for at, head in enumerate(heads) for p in head if p >= SINKS} == want
    assert found != kept(llama, "kvzip-plus", ids)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text"])
def test_a_padded_batch_keeps_what_each_prompt_keeps_alone(name):
    model = models.tiny(name)
    ids = torch.cat([models.prompt(N, seed=2), models.prompt(N, seed=3)])
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    assert kept(model, "kvgrad", ids, 0, mask) == kept(model, "kvgrad", ids[:1])
    assert kept(model, "kvgrad", ids, 1, mask) == kept(model, "kvgrad", ids[1:, 11:])


def test_it_works_under_inference_mode_and_per_query_head(llama):
    ids = models.prompt(N)
    with torch.inference_mode():
        assert kept(llama, "kvgrad", ids) == kept(llama, "kvgrad", ids)
    split = kept(llama, "kvgrad", ids, granularity="query")
    assert len(split[0]) == llama.config.num_attention_heads


def test_answers_are_those_of_generate():
    model, tokenizer = models.tiny("llama"), models.tokenizer()
    text = "The cat sat on the mat. It looked at the sea. " * 3
    cache = kvtrim.compress(model, tokenizer, text, method="kvgrad", keep="50%", chunk=CHUNK)
    given = {"max_new_tokens": 4, "protocol": "question-agnostic"}
    one, two = (
        kvtrim.generate(model, tokenizer, context, "Where?", **given, **more).answers[0]
        for context, more in [
            (text, {"method": "kvgrad", "keep": "50%", "chunk": CHUNK}),
            (cache, {}),
        ]
    )
    assert one.token_ids == two.token_ids and one.kept == two.kept
