"""kvtrim.generate and compress: both protocols, many questions, templates, windows."""

import pytest
import torch

import kvtrim
import models
from kvtrim.errors import CacheError, UsageError
from models import is_attached

CONTEXT = "The cat sat on the mat and looked at the wide blue sea. " * 4
NEW = 6


@pytest.fixture
def model():
    return models.tiny("llama", dtype=torch.float32)


def ask(model, context, question, **options):
    options = {"method": "snapkv", "keep": 64, "max_new_tokens": NEW} | options
    return kvtrim.generate(model, models.tokenizer(), context, question, **options)


def test_one_question_is_question_aware(model):
    result = ask(model, CONTEXT, "Where?")
    assert result.protocol == "question-aware"
    assert result.text == result.texts[0]
    assert result.kept == [[64, 64]] * 3
    assert result.compress_s == 0
    assert not is_attached(model)


def test_several_questions_are_question_agnostic(model):
    result = ask(model, CONTEXT, ["Where?", "Who?"])
    assert result.protocol == "question-agnostic"
    assert len(result.texts) == 2
    assert result.compress_s > 0 and result.ttft_s > result.compress_s


def test_the_protocol_can_be_chosen(model):
    for protocol in ("question-aware", "question-agnostic"):
        for question in ("Where?", ["Where?", "Who?"]):
            assert ask(model, CONTEXT, question, protocol=protocol).protocol == protocol
    with pytest.raises(UsageError, match="protocol='both': expected question-aware"):
        ask(model, CONTEXT, "Where?", protocol="both")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"typical_p": 0.0}, "transformers' generate refuses do_sample, typical_p: "),
        ({"repetition_penalty": 1e-45}, "do_sample, repetition_penalty: no token is left"),
        ({"suppress_tokens": [*range(300)]}, "do_sample, suppress_tokens: no token is left"),
        ({"temperature": 1e-40}, "temperature=1e-40: expected float"),
    ],
)
def test_what_transformers_makes_of_sampling_is_said_plainly(model, options, said):
    with pytest.raises(UsageError, match=said):
        ask(model, CONTEXT, "Where?", do_sample=True, **options)


def test_what_a_ready_cache_settles_is_refused_beside_it(model):
    tokenizer = models.tokenizer()
    cache = kvtrim.compress(model, tokenizer, CONTEXT, method="snapkv", keep=48, window=8)
    settled = {"protocol": "question-aware", "system": "S", "truncate": "middle", "chat": False}
    for name, value in (settled | {"window": 3}).items():
        named = {"method": "snapkv", name: value}
        with pytest.raises(UsageError, match=f"{name} was settled when the cache was made"):
            kvtrim.generate(model, tokenizer, cache, "Where?", **named)
    for call in (kvtrim.generate, kvtrim.compress):
        with pytest.raises(UsageError, match=r"truncate='midle': expected error \| middle"):
            call(model, tokenizer, CONTEXT, truncate="midle")


def test_answers_are_bounded_by_default_under_both_protocols(model):
    for protocol in ("question-aware", "question-agnostic"):
        answer = ask(model, CONTEXT, "Where?", max_new_tokens=None, protocol=protocol).answers[0]
        assert 0 < len(answer.token_ids) <= 128


def test_the_full_method_equals_transformers(model):
    tokenizer = models.tokenizer()
    text = f"<s><user>{CONTEXT}\n\nWhere?<assistant>"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
    )
    for protocol in ("question-aware", "question-agnostic"):
        result = ask(model, CONTEXT, "Where?", method="full", protocol=protocol)
        assert result.answers[0].token_ids == out[0, ids.shape[1] :].tolist()
        assert result.prompt_tokens == ids.shape[1]


def test_questions_leave_the_cache_as_they_found_it(model):
    for method in ("snapkv", "adakv", "h2o", "tova"):
        once = [
            ask(model, CONTEXT, q, method=method, protocol="question-agnostic").text
            for q in ("A?", "B?")
        ]
        together = ask(model, CONTEXT, ["A?", "B?", "A?"], method=method).texts
        assert together == [*once, once[0]]


def test_a_compressed_context_is_asked_again_and_again(model, tmp_path):
    tokenizer = models.tokenizer()
    cache = kvtrim.compress(model, tokenizer, CONTEXT, method="adakv", keep=64)
    before = cache.held_bytes
    direct = ask(model, CONTEXT, ["A?", "B?"], method="adakv")
    assert ask(model, cache, ["A?", "B?"]).texts == direct.texts
    assert ask(model, cache, "B?").text == direct.texts[1]
    assert cache.held_bytes == before
    cache.save(tmp_path / "c.kv", tokenizer)
    loaded = kvtrim.load_cache(tmp_path / "c.kv", model, tokenizer)
    assert ask(model, loaded, ["A?", "B?"]).texts == direct.texts


def test_beams_over_a_compressed_context(model):
    cache = kvtrim.compress(model, models.tokenizer(), CONTEXT, keep=64)
    result = ask(model, cache, ["A?", "B?"], num_beams=3)
    assert result.texts == ask(model, cache, ["A?", "B?"], num_beams=3).texts
    wide = kvtrim.compress(model, models.tokenizer(), CONTEXT, keep=400)
    aware = ask(model, CONTEXT, "A?", keep=400, num_beams=3)
    assert ask(model, wide, "A?", num_beams=3).text == aware.text


def test_an_interrupted_answer_leaves_the_cache_usable(model):
    cache = kvtrim.compress(model, models.tokenizer(), CONTEXT, keep=64)
    expected = ask(model, cache, "A?").text

    def stop(what, done, out_of):
        if what == "answering" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(model, cache, "A?", progress=stop)
    assert ask(model, cache, "A?").text == expected
    assert not is_attached(model)


def test_reading_in_chunks_changes_nothing(model):
    for method in ("snapkv", "h2o"):
        for question in ("A?", ["A?", "B?"]):
            whole = ask(model, CONTEXT, question, method=method)
            chunked = ask(model, CONTEXT, question, method=method, prefill_chunk=50)
            assert chunked.texts == whole.texts and chunked.kept == whole.kept


def test_progress_is_reported(model):
    seen = []
    ask(model, CONTEXT, "A?", progress=lambda *step: seen.append(step), prefill_chunk=50)
    reading = [done for what, done, _ in seen if what == "reading"]
    assert reading == sorted(reading)
    assert [s for s in seen if s[0] == "answering"][-1] == ("answering", NEW, NEW)


def test_sampling_options_reach_transformers(model):
    torch.manual_seed(1)
    first = ask(model, CONTEXT, "A?", do_sample=True, temperature=2.0)
    torch.manual_seed(1)
    again = ask(model, CONTEXT, "A?", do_sample=True, temperature=2.0)
    assert first.text == again.text != ask(model, CONTEXT, "A?").text


def test_greedy_even_for_a_model_that_samples_by_default(model):
    expected = ask(model, CONTEXT, "A?").text
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    model.generation_config.top_k = 7
    assert ask(model, CONTEXT, "A?").text == expected


def test_method_parameters_are_given_as_keywords(model):
    assert ask(model, CONTEXT, "A?", window=8, keep=20).kept == [[20, 20]] * 3
    assert len(ask(model, CONTEXT, "A?", preset="upstream").kept[0]) == 6
    with pytest.raises(UsageError, match="Use keep=33"):
        ask(model, CONTEXT, "A?", keep=20)


def test_the_template_is_applied_once_with_one_start_token(model):
    tokenizer = models.tokenizer()
    for chat, start in ((True, "<s><user>"), (False, "")):
        cache = kvtrim.compress(model, tokenizer, CONTEXT, keep=64, chat=chat)
        text = tokenizer.decode(cache.token_ids[0])
        assert text == start + CONTEXT
    system = kvtrim.compress(model, tokenizer, CONTEXT, keep=64, system="Be brief.")
    assert tokenizer.decode(system.token_ids[0]) == "<s><system>Be brief.<user>" + CONTEXT
    with pytest.raises(UsageError, match="needs the chat template"):
        kvtrim.compress(model, tokenizer, CONTEXT, keep=64, system="x", chat=False)


def test_a_tokenizer_without_template_is_used_as_it_is(model):
    tokenizer = models.tokenizer(chat=False)
    result = kvtrim.generate(model, tokenizer, CONTEXT, "A?", keep=64, max_new_tokens=2)
    assert result.prompt_tokens == len(tokenizer(CONTEXT + "\n\nA?").input_ids)
    with pytest.raises(UsageError, match="no chat template"):
        kvtrim.generate(model, tokenizer, CONTEXT, "A?", chat=True)


def test_what_does_not_fit_is_refused_or_cut_in_the_middle(model):
    with pytest.raises(UsageError, match="--truncate middle"):
        ask(model, CONTEXT * 4, "A?")
    result = ask(model, "START " + CONTEXT * 4 + " END", "A?", truncate="middle")
    assert result.prompt_tokens == 512 - NEW
    cache = kvtrim.compress(
        model, models.tokenizer(), "START " + CONTEXT * 4 + " END", truncate="middle"
    )
    text = models.tokenizer().decode(cache.token_ids[0])
    assert text.startswith("<s><user>START The cat") and text.endswith("sea.  END")
    with pytest.raises(UsageError, match="leaves room"):
        ask(model, cache, "A?")


def test_mistakes_are_named(model):
    with pytest.raises(UsageError, match="context is empty"):
        ask(model, "  ", "A?")
    with pytest.raises(UsageError, match="no question"):
        ask(model, CONTEXT, [])
    with pytest.raises(UsageError, match="one answer per question"):
        ask(model, CONTEXT, "A?", num_return_sequences=2)
    with pytest.raises(CacheError, match="make it with compress"):
        ask(model, kvtrim.Cache(model, "full"), "A?")
