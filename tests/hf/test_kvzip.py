"""KVzip: the probe is read, scored, forgotten, and the whole model shares one budget."""

import pytest
import torch

import kvtrim
import models
import probes
from kvtrim.engine.cuts import Cuts
from kvtrim.hf.probe import repetition
from kvtrim.hf.replay import record
from kvtrim.kernels import explicit
from kvtrim.prompts import Words, frame, repeat_words

SINKS, CHUNK, KEEP, N = 4, 16, 14, 40


def scores_by_hand(model, ids, words=None):
    """Largest attention of every context slot: [L, K, n], one query and one head at a time."""
    recording, steps = record(model, ids), repetition(ids[0].tolist(), words or Words(), CHUNK)
    layers, kv_heads = len(recording.calls), recording.calls[0].keys.shape[1]
    best = torch.zeros(layers, kv_heads, N, dtype=torch.float64)
    for step in steps:
        seen, cache = {}, recording.full.copy()
        cache.session._tap = seen.__setitem__
        positions = torch.arange(N, N + len(step.ids))[None]
        with torch.no_grad(), kvtrim.attach(model):
            model(torch.tensor([step.ids]), position_ids=positions, past_key_values=cache)
        for layer, call in seen.items():
            groups = call.queries.shape[1] // kv_heads
            context = recording.calls[layer].keys[0]
            chunk = range(max(SINKS, step.probed.start), step.probed.stop)
            for head in range(call.queries.shape[1]):
                group = head // groups
                looked_at = [context[group, j] for j in [*range(SINKS), *chunk]]
                for i in range(len(step.ids)):
                    own = [call.keys[0, group, j] for j in range(i + 1)]
                    keys = torch.stack(looked_at + own).double()
                    query = call.queries[0, head, i].double()
                    weights = (keys @ query * call.scale).softmax(dim=0)
                    for place, j in enumerate(chunk):
                        found = weights[SINKS + place]
                        best[layer, group, j] = torch.maximum(best[layer, group, j], found)
    return best


def best_of_all(scores):
    layers, heads, n = scores.shape
    listed = sorted(
        (-float(scores[layer, head, slot]), layer, head, slot)
        for layer in range(layers)
        for head in range(heads)
        for slot in range(SINKS, n)
    )
    chosen = {entry[1:] for entry in listed[: layers * heads * (KEEP - SINKS)]}
    return [
        [
            sorted([*range(SINKS), *(s for at, h, s in chosen if (at, h) == (layer, head))])
            for head in range(heads)
        ]
        for layer in range(layers)
    ]


def test_the_best_of_the_whole_model_stay(llama):
    ids = models.prompt(N)
    cache = kvtrim.Cache(llama, "kvzip", KEEP, chunk=CHUNK)
    with torch.no_grad(), kvtrim.attach(llama):
        llama(ids, past_key_values=cache)
    assert models.positions(cache) == best_of_all(scores_by_hand(llama, ids))
    assert cache.seen == N
    assert torch.equal(cache.token_ids, ids)


def test_the_words_of_a_tokenizer_are_part_of_the_probe_and_its_prefix_goes_first(llama):
    tokenizer = models.tokenizer()
    words = repeat_words(tokenizer, frame(tokenizer))
    ids = models.prompt(N)
    words = Words(words.first[:9], words.later[:9], words.suffix, ids[0, :6].tolist())
    cache = kvtrim.Cache(llama, "kvzip", KEEP, chunk=CHUNK, words=words)
    with torch.no_grad(), kvtrim.attach(llama):
        llama(ids, past_key_values=cache)
    held = models.positions(cache)
    assert held == best_of_all(scores_by_hand(llama, ids, words))
    assert not {4, 5} & {slot for layer in held for head in layer for slot in head}


def test_a_prompt_that_fits_is_not_probed(llama):
    passes = []
    handle = llama.model.register_forward_hook(lambda *_: passes.append(1))
    cache = kvtrim.Cache(llama, "kvzip", N)
    with torch.no_grad(), kvtrim.attach(llama):
        llama(models.prompt(N), past_key_values=cache)
    handle.remove()
    assert len(passes) == 1
    assert cache.entries()[0].tolist() == [[N, N]]


def test_what_is_generated_is_not_probed(llama):
    cache = kvtrim.Cache(llama, "kvzip", N + 2)
    with torch.no_grad(), kvtrim.attach(llama):
        llama(models.prompt(N), past_key_values=cache)
        for _ in range(4):
            llama(torch.tensor([[9]]), past_key_values=cache)
    assert cache.entries()[0].tolist() == [[N + 4, N + 4]]


def test_the_probe_waits_for_the_last_chunk_of_a_prompt(llama):
    ids = models.prompt(N)
    once = kvtrim.Cache(llama, "kvzip", KEEP, chunk=CHUNK)
    parts = kvtrim.Cache(llama, "kvzip", KEEP, chunk=CHUNK, prompt_tokens=N)
    with torch.no_grad(), kvtrim.attach(llama):
        llama(ids, past_key_values=once)
        for part in ids.split(15, dim=1):
            llama(part, past_key_values=parts)
    assert models.positions(parts) == models.positions(once)


def test_budgets_of_one_recording_share_the_probe(llama):
    ids = models.prompt(N)
    recording, passes = record(llama, ids), []
    handle = llama.model.register_forward_hook(lambda *_: passes.append(1))
    few = recording.cache("kvzip", KEEP, chunk=CHUNK)
    probes = len(passes)
    more = recording.cache("kvzip", 20, chunk=CHUNK)
    handle.remove()
    assert probes == 3 and len(passes) == probes
    own = kvtrim.Cache(llama, "kvzip", 20, chunk=CHUNK)
    with torch.no_grad(), kvtrim.attach(llama):
        llama(ids, past_key_values=own)
    assert models.positions(more) == models.positions(own) != models.positions(few)


def test_embeddings_cannot_be_repeated(llama):
    cache = kvtrim.Cache(llama, "kvzip", KEEP)
    embeds = llama.get_input_embeddings()(models.prompt(N))
    with (
        torch.no_grad(),
        kvtrim.attach(llama),
        pytest.raises(kvtrim.KvtrimError, match="input_ids"),
    ):
        llama(inputs_embeds=embeds, past_key_values=cache)


def test_queries_alone_cannot_be_probed():
    q, k = torch.randn(4, 20, 8), torch.randn(2, 20, 8)
    with pytest.raises(kvtrim.KvtrimError, match="needs a model"):
        kvtrim.select("kvzip", q, k, k, keep=8)


def hidden_weights(model):
    """1 / |hidden state| of every query of a probe's pass, by layer."""

    def weigh(run):
        received = {}
        hooks = [
            block.self_attn.register_forward_pre_hook(
                lambda _, args, kwargs, at=at: received.__setitem__(at, kwargs["hidden_states"]),
                with_kwargs=True,
            )
            for at, block in enumerate(model.model.layers)
        ]
        run()
        for hook in hooks:
            hook.remove()
        return {at: 1 / states[0].norm(dim=-1) for at, states in received.items()}

    return weigh


def test_plus_weighs_attention_by_value_and_query(llama):
    ids = models.prompt(N)
    cache = kvtrim.Cache(llama, "kvzip-plus", KEEP, chunk=CHUNK)
    with torch.no_grad(), kvtrim.attach(llama):
        llama(ids, past_key_values=cache)
    assert models.positions(cache) == best_of_all(
        probes.scores_by_hand(llama, ids, CHUNK, SINKS, hidden_weights(llama))
    )
    plain = kvtrim.Cache(llama, "kvzip", KEEP, chunk=CHUNK)
    with torch.no_grad(), kvtrim.attach(llama):
        llama(ids, past_key_values=plain)
    assert models.positions(cache) != models.positions(plain)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("method", ["kvzip", "kvzip-plus"])
def test_scores_from_the_probes_own_attention_keep_what_a_second_product_keeps(
    name, method, monkeypatch
):
    model, noting, calls = models.tiny(name), explicit.largest, []
    monkeypatch.setattr(explicit, "largest", lambda *a: calls.append(1) or noting(*a))
    ids = torch.cat([models.prompt(150, seed=2), models.prompt(150, seed=3)])
    mask = torch.ones_like(ids)
    mask[1, :37] = 0

    def kept():
        cache = kvtrim.Cache(model, method, 40, chunk=48)
        with torch.no_grad(), kvtrim.attach(model):
            model(ids, attention_mask=mask, past_key_values=cache)
            logits = model(ids[:, -1:], past_key_values=cache).logits
        return [models.positions(cache, row) for row in range(2)], logits

    fast, logits = kept()
    assert calls
    calls.clear()
    observe = Cuts.observe
    monkeypatch.setattr(Cuts, "observe", lambda self, *given: observe(self, *given[:4]))
    slow, want = kept()
    assert fast == slow and not calls
    torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-5)


def test_a_prompt_with_named_parts_is_read_in_chunks():
    model, tokenizer = models.tiny("llama"), models.tokenizer()
    text = "The cat sat on the mat. It looked at the sea. " * 3
    whole, parts = (
        kvtrim.compress(model, tokenizer, text, method="kvzip", keep="50%", prefill_chunk=chunk)
        for chunk in (None, 16)
    )
    assert parts.session.state.spans == whole.session.state.spans
    assert models.positions(parts) == models.positions(whole)
