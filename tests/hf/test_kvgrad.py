"""KVgrad: gradients of the probe by finite differences, scores by loops, batches as alone."""

import copy

import pytest
import torch
from transformers import DynamicCache

import kvtrim
import models
from kvtrim.engine.probe import repetition
from kvtrim.hf.cache import Cache
from kvtrim.hf.replay import record
from kvtrim.hf.sensitivity import Sensitivity
from kvtrim.prompts import Words

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


def scores_by_hand(model, ids):
    """KVgrad of every context slot: [L, K, n], one query and one head at a time."""
    recording, steps = record(model, ids), repetition(ids[0].tolist(), Words(), CHUNK)
    layers, kv_heads = len(recording.calls), recording.calls[0].keys.shape[1]
    best = torch.zeros(layers, kv_heads, N, dtype=torch.float64)
    for step in steps:
        seen, cache = {}, recording.full.copy()
        cache.session._tap = seen.__setitem__
        positions = torch.arange(N, N + len(step.ids))[None]
        with torch.no_grad(), kvtrim.attach(model):
            model(torch.tensor([step.ids]), position_ids=positions, past_key_values=cache)
        sizes = gradients(model, ids, torch.tensor([step.ids]))
        for layer, call in seen.items():
            heads, width = call.queries.shape[1], call.values.shape[-1]
            context, values = recording.calls[layer].keys[0], recording.calls[layer].values[0]
            projection = model.model.layers[layer].self_attn.o_proj.weight.detach()
            chunk = range(max(SINKS, step.probed.start), step.probed.stop)
            for head in range(heads):
                group = head // (heads // kv_heads)
                own = projection[:, head * width : (head + 1) * width]
                looked_at = [context[group, j] for j in [*range(SINKS), *chunk]]
                for i in range(len(step.ids)):
                    keys = torch.stack(looked_at + [call.keys[0, group, j] for j in range(i + 1)])
                    weights = (keys @ call.queries[0, head, i] * call.scale).softmax(dim=0)
                    for place, j in enumerate(chunk):
                        value = (own @ values[group, j]).norm()
                        score = weights[SINKS + place] * value * sizes[layer, 0, i]
                        best[layer, group, j] = torch.maximum(best[layer, group, j], score)
    return best


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
    scores = scores_by_hand(llama, ids)[..., SINKS:].flatten()
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
