"""`compare`: one reading of the prompt for all methods that leave it alone, the same answers."""

from contextlib import contextmanager

import pytest

import kvtrim
import models
from kvtrim.bench.candidates import Candidate
from kvtrim.bench.comparison import Comparison
from kvtrim.hf.base import cache_in
from small import small

DOCUMENT = "The cat sat on the mat and looked at the wide blue sea. " * 4
QUESTION = "Where did it look?"
CHANGING = {"fastkv", "gemfilter", "pyramidinfer"}  # their deeper layers read a part


def cells(names, keeps=("40", "50%")):
    return [
        Candidate("full"),
        *(Candidate(name, keep, small(name)) for name in names for keep in keeps),
    ]


def compared(net, asked, **how):
    how = {"max_new_tokens": 6, **how}
    comparison = Comparison(net, models.tokenizer(), DOCUMENT, QUESTION, asked, **how)
    return comparison, comparison.results()


def by_itself(net, cell, **how):
    how = {"max_new_tokens": 6, "protocol": "question-aware", **how}
    asked = {"method": cell.label, "keep": cell.keep or 1.0, **how}
    return kvtrim.generate(net, models.tokenizer(), DOCUMENT, QUESTION, **asked)


def figures(result):
    own = result.answers[0]
    kept = own.held_bytes, own.full_bytes, own.kept, own.prompt_tokens
    return (result.method, result.protocol, own.text, own.token_ids, own.remark, *kept)


@contextmanager
def readings(net):
    """Counts the passes that begin an empty cache with a whole prompt."""
    found = []

    def begun(module, args, kwargs):
        cache = cache_in(kwargs)
        if cache is not None and cache.get_seq_length() == 0:
            found.append(kwargs["input_ids"].shape[1])

    hook = net.get_decoder().register_forward_pre_hook(begun, with_kwargs=True, prepend=True)
    yield found
    hook.remove()


ASKED = {
    "question-aware": sorted(kvtrim.METHODS),
    "question-agnostic": ["echo", "fastkv", "h2o", "kvzip-plus"],
}


@pytest.fixture(scope="module")
def answered():
    """Under each protocol: the model, what was asked, and the results of one comparison of all."""
    found = {}
    for protocol, names in ASKED.items():
        net, asked = models.tiny("llama"), cells(names, ["40"])
        results = compared(net, asked, protocol=protocol)[1]
        found[protocol] = net, {c.method: (c, r) for c, r in zip(asked, results, strict=True)}
    return found


@pytest.mark.parametrize(
    "protocol,name", [(how, name) for how, names in ASKED.items() for name in ("full", *names)]
)
def test_a_method_answers_and_holds_what_it_does_by_itself(answered, name, protocol):
    net, results = answered[protocol]
    cell, result = results[name]
    assert figures(result) == figures(by_itself(net, cell, protocol=protocol)), cell


@pytest.mark.parametrize("architecture", ["gemma2", "phi3"])
def test_so_it_is_on_models_that_slide_and_other_ones(architecture):
    net, asked = models.tiny(architecture), cells(["snapkv", "kvzip", "h2o"], ["40"])
    _, found = compared(net, asked)
    for cell, result in zip(asked, found, strict=True):
        assert figures(result) == figures(by_itself(net, cell)), cell


def test_a_prompt_is_read_once_for_all_that_leave_the_pass_alone(llama):
    names = ["snapkv", "h2o", "kvzip", "adakv", "streaming-llm"]
    with readings(llama) as found:
        comparison, _ = compared(llama, cells(names))
    assert len(found) == 1 and comparison.alone == []
    with readings(llama) as found:
        comparison, _ = compared(llama, cells([*names, *CHANGING], ["40"]))
    assert {cell.method for cell in comparison.alone} == CHANGING
    assert len(found) == 1 + len(CHANGING) or len(found) == 2 + len(CHANGING)  # a restart is two


def test_passes_of_bounded_length_are_not_shared(llama):
    with readings(llama) as found:
        comparison, results = compared(llama, cells(["snapkv"], ["40"]), prefill_chunk=50)
    assert len(comparison.alone) == len(results) == len(found) == 2 and max(found) == 50
    assert comparison.reading_s is None


def test_a_configuration_that_asks_for_beams_is_obeyed(llama):
    llama.generation_config.num_beams = 2
    asked = cells(["snapkv"], ["40"])
    comparison, found = compared(llama, asked)
    assert len(comparison.alone) == 2
    assert figures(found[1]) == figures(by_itself(llama, asked[1]))


def test_what_the_configuration_says_of_tokens_holds_for_the_first_one_too(llama):
    asked = cells(["snapkv"], ["40"])
    first = compared(llama, asked)[1][1].answers[0].token_ids[0]
    llama.generation_config.suppress_tokens = [first]
    _, found = compared(llama, asked)
    assert found[1].answers[0].token_ids[0] != first
    assert figures(found[1]) == figures(by_itself(llama, asked[1]))


def test_where_memory_does_not_do_every_method_reads_for_itself(llama, monkeypatch):
    def full(*given):
        raise MemoryError

    monkeypatch.setattr("kvtrim.bench.comparison.record", full)
    asked = cells(["snapkv"], ["40"])
    comparison, found = compared(llama, asked)
    assert len(comparison.alone) == 2
    assert figures(found[1]) == figures(by_itself(llama, asked[1]))


def test_seconds_to_the_first_token_hold_the_reading(llama):
    comparison, found = compared(llama, cells(["snapkv"], ["40"]))
    reading_s = comparison.reading_s or 0.0
    assert all(result.ttft_s > reading_s > 0 for result in found)
    comparison, found = compared(llama, cells(["h2o"], ["40"]), protocol="question-agnostic")
    reading_s = comparison.reading_s or 0.0
    assert all(result.compress_s > reading_s > 0 for result in found)
