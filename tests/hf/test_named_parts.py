"""Named parts on their way through a model: batches, beams, chunks, copies, files, answers."""

import pytest
import torch

import kvtrim
import models
from kvtrim.errors import UsageError
from kvtrim.hf.generate import read
from kvtrim.hf.replay import record
from kvtrim.prompts import encode_context, encode_question, frame

NEW, KEEP = 10, 24
ONE = {"shots": [(2, 10), (10, 16), [(16, 20), (24, 28)], (28, 40)], "question": [(42, 47)]}
TWO = {"shots": [(0, 5), (5, 12), (12, 26)]}
METHODS = ["shotkv", "random-shot"]


def cache_for(model, spans, name="shotkv", **options):
    return kvtrim.Cache(model, name, KEEP, spans=spans, **options)


def generate(model, ids, cache, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None} | options
    with kvtrim.attach(model):
        return model.generate(ids, attention_mask=mask, past_key_values=cache, **options)


def go_on(model, cache, steps=8):
    token, logits = torch.tensor([[9]]), []
    with torch.no_grad(), kvtrim.attach(model):
        for _ in range(steps):
            logits.append(model(token, past_key_values=cache).logits[:, -1])
            token = logits[-1].argmax(-1, keepdim=True)
    return torch.cat(logits)


def require_whole(cache, spans, row=0):
    """Every shot is held whole or not at all; everything beside the shots is held."""
    length = cache.session.state.generated[row][0]
    shots = [unit if isinstance(unit, list) else [unit] for unit in spans["shots"]]
    inside = [{t for a, b in unit for t in range(a, b)} for unit in shots]
    kept = 0
    for layer in models.positions(cache, row):
        prompts = [{t for t in head if t < length} for head in layer]
        assert all(prompt == prompts[0] for prompt in prompts)
        for tokens in inside:
            assert len(tokens & prompts[0]) in (0, len(tokens))
        assert set(range(length)) - set().union(*inside) <= prompts[0]
        kept += len(prompts[0]) < length
    assert kept, "nothing was evicted, so nothing was proven"


@pytest.mark.parametrize("name", METHODS)
def test_a_padded_batch_with_its_own_spans_equals_its_prompts_alone(llama, name):
    prompts = [models.prompt(n, seed=n)[0] for n in (48, 30, 41)]
    ids, mask = torch.zeros(3, 48, dtype=torch.long), torch.zeros(3, 48, dtype=torch.long)
    for i, row in enumerate(prompts):
        ids[i, 48 - len(row) :], mask[i, 48 - len(row) :] = row, 1
    spans = [ONE, TWO, {}]
    batch = cache_for(llama, spans, name)
    out = generate(llama, ids, batch, mask)
    for row, own in enumerate(prompts):
        alone = cache_for(llama, spans[row], name)
        expected = generate(llama, own[None], alone)
        assert torch.equal(out[row, 48:], expected[0, len(own) :])
        assert models.positions(batch, row) == models.positions(alone)
    require_whole(batch, ONE, 0)
    require_whole(batch, TWO, 1)


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_with_its_own_spans_equals_its_prompts_alone(llama, name):
    ids, spans = models.prompt(48, rows=3), [ONE, TWO, {"shots": [(0, 6), (20, 44)]}]
    batch = cache_for(llama, spans, name)
    out = generate(llama, ids, batch)
    for row in range(3):
        alone = cache_for(llama, spans[row], name)
        assert torch.equal(out[row], generate(llama, ids[row : row + 1], alone)[0])
        assert models.positions(batch, row) == models.positions(alone)
        require_whole(batch, spans[row], row)


def test_rows_are_selected_with_their_spans(llama):
    ids = models.prompt(48, rows=2)
    cache = cache_for(llama, [ONE, TWO], prompt_tokens=48)
    with kvtrim.attach(llama):
        read(llama, ids[:, :20], cache)
        cache.batch_select_indices(torch.tensor([1, 0]))
        read(llama, ids[[1, 0], 20:], cache)
    for row, own in ((0, 1), (1, 0)):
        alone = cache_for(llama, [ONE, TWO][own])
        with kvtrim.attach(llama):
            read(llama, ids[own : own + 1], alone)
        assert models.positions(cache, row) == models.positions(alone)


def test_beams_share_the_spans_of_their_prompt(llama):
    ids = models.prompt(48)
    cache = cache_for(llama, ONE)
    out = generate(llama, ids, cache, num_beams=3)
    again = generate(llama, ids, cache_for(llama, ONE, impl="reference"), num_beams=3)
    assert torch.equal(out, again)
    require_whole(cache, ONE)


def test_reading_in_chunks_keeps_the_same_shots(llama):
    ids = models.prompt(48)
    for observers in ("all", "last_w", "question"):
        options = {"observers": observers, "window": 12}
        once, parts = (cache_for(llama, ONE, prompt_tokens=48, **options) for _ in range(2))
        with kvtrim.attach(llama):
            read(llama, ids, once)
            read(llama, ids, parts, 7)
        assert models.positions(parts) == models.positions(once)
        require_whole(parts, ONE)
        assert torch.equal(go_on(llama, parts), go_on(llama, once))


@pytest.mark.parametrize("name", METHODS)
def test_saved_loaded_copied_and_replayed_caches_go_on_alike(llama, name, tmp_path):
    ids = models.prompt(48)
    cache = cache_for(llama, ONE, name, accumulate=True) if name == "shotkv" else None
    cache = cache or cache_for(llama, ONE, name)
    with torch.no_grad(), kvtrim.attach(llama):
        llama(ids, past_key_values=cache)
    go_on(llama, cache, 3)
    cache.save(tmp_path / "x.kv")
    loaded = kvtrim.load_cache(tmp_path / "x.kv", llama)
    assert loaded.session.state.spans == cache.session.state.spans
    copied = cache.copy()
    expected = go_on(llama, cache)
    assert torch.equal(go_on(llama, loaded), expected)
    assert torch.equal(go_on(llama, copied), expected)
    assert models.positions(loaded) == models.positions(copied) == models.positions(cache)


@pytest.mark.parametrize("name", METHODS)
def test_a_replayed_prompt_has_its_spans(llama, name):
    ids = models.prompt(48)
    recording = record(llama, ids, ONE)
    own = cache_for(llama, ONE, name)
    with torch.no_grad(), kvtrim.attach(llama):
        llama(ids, past_key_values=own)
    replayed = recording.cache(name, KEEP)
    assert models.positions(replayed) == models.positions(own)
    assert models.positions(recording.cache(name, KEEP, spans=TWO)) != models.positions(own)
    assert torch.equal(go_on(llama, replayed), go_on(llama, own))


def test_wrong_spans_are_refused_before_anything_is_read(llama):
    with pytest.raises(UsageError, match="overlap"):
        cache_for(llama, {"shots": [(0, 4), (2, 6)]})
    ids = models.prompt(40)
    cache = cache_for(llama, ONE)
    with kvtrim.attach(llama):
        with pytest.raises(UsageError, match="beyond the 40 tokens"):
            llama(ids, past_key_values=cache)
        llama(models.prompt(48), past_key_values=cache)
        require_whole(cache, ONE)
        with pytest.raises(UsageError, match="given for 2 prompts, the input has 3"):
            llama(models.prompt(48, rows=3), past_key_values=cache_for(llama, [ONE, TWO]))


def test_a_reset_cache_reads_the_same_prompt_again(llama):
    ids = models.prompt(48)
    cache = cache_for(llama, ONE)
    with torch.no_grad(), kvtrim.attach(llama):
        llama(ids, past_key_values=cache)
        first = models.positions(cache)
        cache.reset()
        llama(ids, past_key_values=cache)
    assert models.positions(cache) == first


def test_taking_back_generated_tokens_and_generating_others(llama):
    """A cache that evicted nothing since may be cropped; what is generated next is not frozen."""
    ids = models.prompt(48)
    cache = cache_for(llama, ONE, share=0.5)
    with torch.no_grad(), kvtrim.attach(llama):
        llama(ids, past_key_values=cache)
        llama(ids[:, :4], past_key_values=cache)
        cache.crop(-4)
    assert cache.session.state.generated[0][0] == 48
    go_on(llama, cache, 6)
    assert all(
        len([p for p in h if p >= 48]) == 3 for layer in models.positions(cache) for h in layer
    )


# Through kvtrim.generate

SHOTS = (
    "Q: one?\nA: red.\n\nQ: two?\nA: blue as the sea.\n\nQ: three?\nA: no.\n\nQ: four?\nA: it is."
)
DOCUMENT = kvtrim.Document.split(SHOTS, "\n\n")
TEXT = "The cat sat on the mat. Was it red? It looked at the wide blue sea! Then it went away."


@pytest.fixture
def model():
    return models.tiny("llama", dtype=torch.float32)


def ask(model, context, question, **options):
    options = {"keep": 64, "max_new_tokens": NEW, "method": "shotkv"} | options
    return kvtrim.generate(model, models.tokenizer(), context, question, **options)


@pytest.mark.parametrize("document", [DOCUMENT, TEXT], ids=["shots", "sentences"])
def test_a_prompt_keeps_its_template_question_and_whole_parts(model, document):
    tokenizer = models.tokenizer()
    around = frame(tokenizer)
    prompt = encode_context(tokenizer, around, document)
    prompt = prompt.with_question(encode_question(tokenizer, around, "Five?"))
    name = "shots" if document is DOCUMENT else "sentences"
    cache = kvtrim.Cache(model, "shotkv", 64, spans=prompt.spans)
    with torch.no_grad(), kvtrim.attach(model):
        model(torch.tensor([prompt.ids]), past_key_values=cache)
    require_whole(cache, {"shots": [list(unit) for unit in prompt.spans[name]]})
    want = [[len(head) for head in layer] for layer in models.positions(cache)]
    assert ask(model, document, "Five?").kept == want
    agnostic = ask(model, document, "Five?", protocol="question-agnostic")
    assert agnostic.protocol == "question-agnostic"


def test_a_question_that_comes_later_is_appended_whole(model):
    tokenizer = models.tokenizer()
    cache = kvtrim.compress(model, tokenizer, DOCUMENT, method="shotkv", keep=48)
    length = len(encode_context(tokenizer, frame(tokenizer), DOCUMENT))
    before = models.positions(cache)
    with torch.no_grad(), kvtrim.attach(model):
        model(models.prompt(20), past_key_values=cache)
    for layer, old in zip(models.positions(cache), before, strict=True):
        assert layer == [head + list(range(length, length + 20)) for head in old]


def test_neither_chunks_nor_the_number_of_questions_change_an_answer(model):
    for question in ("Five?", ["Five?", "Six or seven?"]):
        whole = ask(model, DOCUMENT, question)
        for chunk in (17, 25):  # each leaves a last pass over one token of a question
            parts = ask(model, DOCUMENT, question, prefill_chunk=chunk)
            assert parts.texts == whole.texts and parts.kept == whole.kept


def test_a_saved_context_is_asked_again(model, tmp_path):
    tokenizer = models.tokenizer()
    cache = kvtrim.compress(model, tokenizer, DOCUMENT, method="shotkv", keep="50%")
    cache.save(tmp_path / "c.kv", tokenizer)
    loaded = kvtrim.load_cache(tmp_path / "c.kv", model, tokenizer)
    direct = ask(model, DOCUMENT, ["A?", "B?"], keep="50%")
    assert ask(model, loaded, ["A?", "B?"]).texts == direct.texts
    assert ask(model, cache, ["A?", "B?"]).texts == direct.texts


def test_observers_in_the_question_need_a_question(model):
    tokenizer = models.tokenizer()
    around = frame(tokenizer)
    prompt = encode_context(tokenizer, around, DOCUMENT)
    prompt = prompt.with_question(encode_question(tokenizer, around, "Five?"))
    held = {}
    for observers in ("question", "all"):
        cache = kvtrim.Cache(model, "shotkv", 64, spans=prompt.spans, observers=observers)
        with torch.no_grad(), kvtrim.attach(model):
            model(torch.tensor([prompt.ids]), past_key_values=cache)
        held[observers] = models.positions(cache)
        counts = [[len(head) for head in layer] for layer in held[observers]]
        assert ask(model, DOCUMENT, "Five?", observers=observers).kept == counts
    assert held["question"] != held["all"]
    with pytest.raises(UsageError, match="question-aware"):
        ask(model, DOCUMENT, "Five?", observers="question", protocol="question-agnostic")


def test_a_document_that_is_too_long_loses_its_middle(model):
    long = kvtrim.Document.split(" ## ".join(SHOTS[:60] for _ in range(12)), "##")
    result = ask(model, long, "Five?", truncate="middle", keep=200)
    assert result.prompt_tokens == 512 - NEW
    assert all(head <= 200 for layer in result.kept for head in layer)


def test_other_methods_take_documents_too(model):
    for method in ("snapkv", "full", "h2o"):
        named = ask(model, DOCUMENT, "Five?", method=method)
        assert named.text == ask(model, SHOTS, "Five?", method=method).text
