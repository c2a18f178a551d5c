"""Rolled positions equal a model that rotates its keys at their slots from the start."""

import copy
import sys

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

import kvtrim
import models
from kvtrim.errors import UnsupportedModelError
from kvtrim.hf.replay import record
from kvtrim.hf.rotary import rotations

SINKS = 4


class ExactRotary(torch.nn.Module):
    """A rotary embedding in the model's own number format; transformers rounds angles to fp32."""

    def __init__(self, stock):
        super().__init__()
        self.rope_type = stock.rope_type
        for name, buffer in stock.named_buffers():
            self.register_buffer(name, buffer.double())

    def forward(self, x, position_ids, layer_type=None):
        name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
        angles = position_ids[..., None].double() * getattr(self, name)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def exact(model):
    decoder = model.get_decoder()
    decoder.rotary_emb = ExactRotary(decoder.rotary_emb)
    return model


# Oracle one: a Llama written out, whose cache holds keys that were never rotated


def turned(x, position, inv_freq):
    """One vector [..., D] rotated to a position, pair by pair."""
    out, half = x.clone(), len(inv_freq)
    for i in range(half):
        angle = position * inv_freq[i]
        cos, sin = torch.cos(angle), torch.sin(angle)
        out[..., i] = x[..., i] * cos - x[..., i + half] * sin
        out[..., i + half] = x[..., i + half] * cos + x[..., i] * sin
    return out


def read_block(model, ids, caches, inv_freq):
    """Logits of new tokens over caches of unrotated keys, all of them rotated at their slots."""
    config, decoder = model.config, model.model
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    x, count = decoder.embed_tokens(ids), len(ids)
    for layer, cache in zip(decoder.layers, caches, strict=True):
        h, at = layer.input_layernorm(x), layer.self_attn
        q = at.q_proj(h).view(count, heads, -1)
        cache["k"] = torch.cat([cache["k"], at.k_proj(h).view(count, kv_heads, -1)])
        cache["v"] = torch.cat([cache["v"], at.v_proj(h).view(count, kv_heads, -1)])
        slots = len(cache["k"])
        keys = torch.stack([turned(cache["k"][s], s, inv_freq) for s in range(slots)])
        out = torch.zeros_like(q)
        for i in range(count):
            own = slots - count + i
            query = turned(q[i], own, inv_freq)
            for head in range(heads):
                group = head // (heads // kv_heads)
                logits = keys[: own + 1, group] @ query[head] * at.scaling
                out[i, head] = logits.softmax(0) @ cache["v"][: own + 1, group]
        x = x + at.o_proj(out.flatten(1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(decoder.norm(x))


def stream(model, ids, blocks, keep):
    """StreamingLLM as its paper has it: logits of every block."""
    inv_freq = model.model.rotary_emb.inv_freq
    config = model.config
    none = torch.zeros(0, config.num_key_value_heads, config.head_dim, dtype=model.dtype)
    caches = [{"k": none, "v": none} for _ in model.model.layers]
    logits, start = [], 0
    with torch.no_grad():
        for number, count in enumerate(blocks):
            room = keep - count
            for cache in caches if number else []:
                if len(cache["k"]) > room:
                    for name, held in cache.items():
                        recent = held[len(held) - max(0, room - SINKS) :]
                        cache[name] = torch.cat([held[:SINKS], recent])
            logits.append(read_block(model, ids[start : start + count], caches, inv_freq))
            start += count
    return torch.cat(logits)


@pytest.mark.parametrize(
    "blocks",
    [[24, *[1] * 8], [20, 3, 1, 5, 1, 1, 12], [1] * 26],
    ids=["prompt and steps", "blocks of tokens", "a stream from the first token"],
)
def test_it_is_the_llama_that_caches_unrotated_keys(blocks):
    model = exact(models.tiny("llama"))
    ids = models.prompt(sum(blocks))
    expected = stream(model, ids[0], blocks, keep=12)
    cache = kvtrim.Cache(model, "streaming-llm", 12, preset="upstream")
    with torch.no_grad(), kvtrim.attach(model):
        logits = [model(part, past_key_values=cache).logits for part in ids.split(blocks, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1)[0], expected, rtol=1e-9, atol=1e-9)


# Oracle two: any model, its own rotation undone and applied again at the slots of what is seen

_SEEN = {}


def at_slots(module, query, key, value, attention_mask, scaling=None, softcap=None, **_):
    """Attention of query i over `_SEEN[layer][i][kv head]`, everything rotated at its slot."""
    rotate, seen = _SEEN["rotate"], _SEEN[module.layer_idx]
    n, groups = query.shape[2], query.shape[1] // key.shape[1]
    here = torch.arange(n)
    if seen is not None:
        query, key = rotate(module, query, -here), rotate(module, key, -here)
    out = torch.zeros(*query.shape[:3], value.shape[-1], dtype=value.dtype)
    for head in range(key.shape[1]):
        group = slice(head * groups, (head + 1) * groups)  # query heads that share it
        for i in range(n):
            if seen is None:  # a layer that slides
                held = list(range(max(0, i - models.WINDOW + 1), i + 1))
                q, k = query[0, group, i], key[0, head, held]
            else:
                held = seen[i][head]
                slots = torch.arange(len(held))
                q = rotate(module, query[:, group, i : i + 1], slots[-1:])[0, :, 0]
                k = rotate(module, key[:, head, None, held], slots)[0, 0]
            logits = q @ k.T * scaling
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            out[0, group, i] = logits.softmax(-1) @ value[0, head, held]
    return out.transpose(1, 2).contiguous(), None


def rotation_of(model):
    """Rotate [1, heads, m, D] by positions [m], with transformers' own functions."""
    decoder = model.get_decoder()
    types = getattr(model.config, "layer_types", None)

    def rotate(module, x, positions):
        by_type = isinstance(decoder.rotary_emb.rope_type, dict)
        extra = (types[module.layer_idx],) if by_type else ()
        cos, sin = decoder.rotary_emb(x, positions[None], *extra)
        return sys.modules[type(module).__module__].apply_rotary_pos_emb(x, x, cos, sin)[0]

    return rotate


def run_at_slots(model, ids, seen):
    AttentionInterface.register("oracle-slots", at_slots)
    AttentionMaskInterface.register("oracle-slots", lambda **_: None)
    _SEEN.clear()
    _SEEN.update(seen, rotate=rotation_of(model))
    before = model.config._attn_implementation
    model.set_attn_implementation("oracle-slots")
    try:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits
    finally:
        model.set_attn_implementation(before)


def follow(model, cache, ids, blocks):
    """Logits of each block, and what every token saw: [managed layer][token][head] positions."""
    kv_heads = model.config.num_key_value_heads
    seen = [[] for _ in cache.managed]
    logits, start = [], 0
    with torch.no_grad(), kvtrim.attach(model):
        for part in ids.split(blocks, dim=1):
            before = models.positions(cache) or [[[]] * kv_heads for _ in cache.managed]
            logits.append(model(part, past_key_values=cache).logits)
            count = part.shape[1]
            if cache.method.schedule.ahead and start:
                before = [
                    [[p for p in head if p < start] for head in x] for x in models.positions(cache)
                ]
            for layer, heads in zip(seen, before, strict=True):
                for i in range(start, start + count):
                    layer.append([[*head, *range(start, i + 1)] for head in heads])
            start += count
    return torch.cat(logits, dim=1), seen


def expected_logits(model, cache, ids, seen):
    layers = range(model.config.num_hidden_layers)
    numbers = {layer: number for number, layer in enumerate(cache.managed)}
    plan = {x: seen[numbers[x]] if x in numbers else None for x in layers}
    return run_at_slots(model, ids, plan)


METHODS = {
    "upstream": ("streaming-llm", {"preset": "upstream"}),
    "ragged heads": ("adakv", {"positions": "rolled", "window": 4}),
    "scores at slots": ("h2o", {"preset": "upstream-stream", "heavy": 8, "granularity": "kv"}),
    "scores of the newest": ("tova", {"positions": "rolled", "per_head": True}),
    "skipped layers": ("knorm", {"positions": "rolled", "every": 2, "skip_layers": (1,)}),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_kind_of_method_equals_the_oracle(llama, name):
    method, settings = METHODS[name]
    model, ids = exact(llama), models.prompt(50, seed=4)
    cache = kvtrim.Cache(model, method, 16, **settings)
    logits, seen = follow(model, cache, ids, [36, 1, 1, 1, 4, 1, 1, 3, 1, 1])
    expected = expected_logits(model, cache, ids, seen)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    original = kvtrim.Cache(model, method, 16, **settings | {"positions": "original"})
    far = follow(model, original, ids, [36, 1, 1, 1, 4, 1, 1, 3, 1, 1])[0]
    assert float((far[:, 40:] - logits[:, 40:]).abs().max()) > 1e-3, "positions made no difference"


def test_every_architecture_equals_the_oracle(any_model):
    model, ids = exact(any_model), models.prompt(46, seed=5)
    cache = kvtrim.Cache(model, "streaming-llm", 12, preset="upstream")
    logits, seen = follow(model, cache, ids, [36, 1, 1, 2, 1, 1, 1, 1, 1, 1])
    expected = expected_logits(model, cache, ids, seen)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


def test_a_rotary_part_of_the_head_is_turned_and_the_rest_left_alone():
    config = models.tiny("phi3").config
    rope = {**config.rope_parameters, "partial_rotary_factor": 0.5}
    model = exact(fresh(config, rope_parameters=rope))
    assert model.model.rotary_emb.inv_freq.shape == (2,), "2 of 4 pairs turn"
    ids = models.prompt(44, seed=6)
    cache = kvtrim.Cache(model, "streaming-llm", 12, preset="upstream")
    logits, seen = follow(model, cache, ids, [36, *[1] * 8])
    expected = expected_logits(model, cache, ids, seen)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


def fresh(config, **changes):
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).double().eval()


def test_a_padded_batch_equals_its_prompts_alone(llama):
    model = exact(llama)
    lengths, steps = (30, 22), 6
    prompts = [models.prompt(n + steps, seed=n) for n in lengths]
    ids = torch.zeros(2, max(lengths), dtype=torch.long)
    mask = torch.zeros(2, max(lengths) + steps, dtype=torch.long)
    for row, n in enumerate(lengths):
        ids[row, -n:], mask[row, -n - steps :] = prompts[row][0, :n], 1
    together = kvtrim.Cache(model, "streaming-llm", 12, preset="upstream")
    alone = [kvtrim.Cache(model, "streaming-llm", 12, preset="upstream") for _ in lengths]
    with torch.no_grad(), kvtrim.attach(model):
        model(ids, attention_mask=mask[:, : max(lengths)], past_key_values=together)
        for row, n in enumerate(lengths):
            model(prompts[row][:, :n], past_key_values=alone[row])
        for step in range(steps):
            new = torch.cat([prompts[row][:, n + step, None] for row, n in enumerate(lengths)])
            seen = mask[:, : max(lengths) + step + 1]
            batch = model(new, attention_mask=seen, past_key_values=together).logits
            for row in range(2):
                single = model(new[row, None], past_key_values=alone[row]).logits[0]
                torch.testing.assert_close(batch[row], single, rtol=1e-9, atol=1e-9)


def test_the_slow_kernel_agrees_and_a_saved_stream_goes_on(llama, tmp_path):
    ids = models.prompt(50, seed=8)
    fast = kvtrim.Cache(llama, "streaming-llm", 12, preset="upstream")
    slow = kvtrim.Cache(llama, "streaming-llm", 12, preset="upstream", impl="reference")
    with torch.no_grad(), kvtrim.attach(llama):
        for cache in (fast, slow):
            llama(ids[:, :40], past_key_values=cache)
            llama(ids[:, 40:42], past_key_values=cache)
        fast.save(tmp_path / "stream.kv")
        loaded = kvtrim.load_cache(tmp_path / "stream.kv", llama)
        mark = fast.mark()
        parts = [ids[:, at : at + 1] for at in range(42, 50)]
        run = {}
        for name, cache in (("fast", fast), ("slow", slow), ("loaded", loaded)):
            run[name] = torch.cat([llama(x, past_key_values=cache).logits for x in parts], 1)
        fast.rewind(mark)
        again = torch.cat([llama(x, past_key_values=fast).logits for x in parts], 1)
    torch.testing.assert_close(run["slow"], run["fast"], rtol=1e-9, atol=1e-9)
    assert torch.equal(run["loaded"], run["fast"]) and torch.equal(again, run["fast"])


def test_generate_streams_with_a_bounded_cache(llama):
    cache = kvtrim.Cache(llama, "streaming-llm", 12, preset="upstream")
    with kvtrim.attach(llama):
        out = llama.generate(
            models.prompt(20), past_key_values=cache, max_new_tokens=30, do_sample=False,
            eos_token_id=None,
        )  # fmt: skip
    assert out.shape == (1, 50)
    assert all(bool((counts == 12).all()) for counts in cache.entries())


def test_nothing_moves_while_nothing_was_evicted(llama):
    ids = models.prompt(40)
    plain = kvtrim.Cache(llama, "full")
    cache = kvtrim.Cache(llama, "streaming-llm", 40, preset="upstream")
    with torch.no_grad(), kvtrim.attach(llama):
        for part in ids.split([30, 1, 1, 8], dim=1):
            expected = llama(part, past_key_values=plain).logits
            assert torch.equal(llama(part, past_key_values=cache).logits, expected)


def test_models_whose_frequencies_change_are_refused_before_any_work():
    config = models.tiny("llama").config
    rope = {**config.rope_parameters, "rope_type": "dynamic", "factor": 2.0}
    model = fresh(config, rope_parameters=rope)
    kvtrim.Cache(model, "streaming-llm", 12, preset="bounded")
    with pytest.raises(UnsupportedModelError, match="'dynamic'; use positions='original'"):
        kvtrim.Cache(model, "streaming-llm", 12, preset="upstream")


def test_untested_architectures_are_refused_before_any_work(llama):
    llama.config.model_type = "llama-of-mine"
    with pytest.raises(UnsupportedModelError, match=r"not on 'llama-of-mine'.*preset=bounded"):
        kvtrim.Cache(llama, "streaming-llm", 12, preset="upstream")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_turning_rounds_once_and_turning_by_nothing_changes_no_bit(llama, dtype):
    (turn, *_) = rotations(llama)
    keys = torch.randn(20, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    by = torch.arange(20) * 100
    exactly = torch.stack(
        [turn(k[None], n[None])[0] for k, n in zip(keys.double(), by, strict=True)]
    )
    assert turn(keys, by).dtype == dtype
    torch.testing.assert_close(turn(keys, by), exactly.to(dtype), rtol=1e-3, atol=1e-4)
    assert torch.equal(turn(keys, by * 0), keys)


def test_a_stream_goes_on_from_a_recorded_prefill(llama):
    ids = models.prompt(48, seed=9)
    own = kvtrim.Cache(llama, "streaming-llm", 12, preset="upstream")
    replayed = record(llama, ids[:, :40]).cache("streaming-llm", 12, preset="upstream")
    with torch.no_grad(), kvtrim.attach(llama):
        llama(ids[:, :40], past_key_values=own)
        for part in ids[:, 40:].split(1, dim=1):
            expected = llama(part, past_key_values=own).logits
            assert torch.equal(llama(part, past_key_values=replayed).logits, expected)
