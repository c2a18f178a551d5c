"""What methods keep, with their answers: the same answers, and likelihoods counted by hand."""

import pytest
import torch

import kvtrim
import models
from kvtrim.bench.candidates import Candidate
from kvtrim.bench.comparison import Comparison
from kvtrim.bench.kept import Showing
from kvtrim.hf.view import positions
from small import small

DOCUMENT = "The cat sat on the mat and looked at the wide blue sea. " * 4
QUESTION = "Where did it look?"
NAMES = ("full", "snapkv", "h2o", "fastkv")


def showing(net, protocol, question=QUESTION, names=NAMES):
    cells = [Candidate(name, "" if name == "full" else "40", small(name)) for name in names]
    comparison = Comparison(
        net, models.tokenizer(), DOCUMENT, question or "", cells, max_new_tokens=6,
        protocol=protocol,
    )  # fmt: skip
    return Showing(net, models.tokenizer(), comparison, question), comparison


@pytest.mark.parametrize("protocol", ["question-agnostic", "question-aware"])
def test_answers_are_those_without_a_page(llama, protocol):
    shown, _ = showing(llama, protocol)
    _, plain = showing(llama, protocol)
    for one, other in zip(shown.results(), plain.results(), strict=True):
        assert one.answers[0].token_ids == other.answers[0].token_ids
        assert one.held_bytes == other.held_bytes and one.kept == other.kept
    made = shown.exhibit("tiny")
    assert [stop.method.partition(":")[0] for stop in made.stops] == [*NAMES]
    assert protocol in made.about[1].lower() and made.question == QUESTION


@pytest.mark.parametrize("protocol", ["question-agnostic", "question-aware"])
def test_the_full_cache_is_as_sure_of_its_answer_as_the_model(llama, protocol):
    shown, comparison = showing(llama, protocol)
    gold = shown.results()[0].answers[0].token_ids
    whole = torch.tensor([comparison.read_ids + comparison.then_ids + gold])
    with torch.no_grad():
        log = llama(input_ids=whole).logits[0].log_softmax(dim=-1)
    by_hand = log[-len(gold) - 1 : -1].gather(1, torch.tensor(gold)[:, None]).sum()
    made = shown.exhibit("tiny")
    assert made.stops[0].said.log_prob == pytest.approx(float(by_hand), abs=1e-5)
    others = [stop.said.log_prob for stop in made.stops[1:]]
    assert all(each < 0 and each != made.stops[0].said.log_prob for each in others)


@pytest.mark.parametrize("asked", [True, False])
def test_what_is_shown_is_what_the_method_keeps_by_itself(llama, asked):
    shown, _ = showing(llama, "question-agnostic", QUESTION if asked else None)
    _ = shown.results() if asked else shown.caches()
    made = shown.exhibit("tiny")
    for stop in made.stops:
        name = stop.method.partition(":")[0]  # parameters stand behind it
        cache = kvtrim.compress(
            llama, models.tokenizer(), DOCUMENT, method=name, keep=40, **small(name)
        )
        assert stop.held_bytes == cache.held_bytes
        for ours, own in zip(stop.positions, positions(cache), strict=True):
            assert [head.tolist() for head in ours] == [head.tolist() for head in own]
        assert (stop.said is None) is not asked


def test_evidence_that_is_not_there_is_refused_before_anything_is_read(llama):
    shown, _ = showing(llama, "question-agnostic")
    with pytest.raises(kvtrim.KvtrimError, match="does not stand"):
        shown.require_evidence(["a dog"])
    shown.require_evidence(["wide blue SEA"])
    shown.results()
    made = shown.exhibit("tiny", ["wide blue SEA"])
    assert len(made.evidence) == 4 and made.evidence[0].given
