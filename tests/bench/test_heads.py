"""Needle prompts, and the scores of heads against plain loops over transformers' own attention."""

import random
from itertools import islice

import pytest
import torch

import kvtrim
import models
from kvtrim.bench.calibrate import heads
from kvtrim.bench.calibrate.heads import Plan, answer, measure, reasoning_score, retrieval_score
from kvtrim.bench.calibrate.needles import plant
from kvtrim.errors import ModelError, UsageError
from kvtrim.tasks import haystack
from kvtrim.tasks.scorers import rouge1_recall, token_f1

KINDS = ("copy", "contrast", "one-step", "two-step")
LENGTHS = (400, 440)


@pytest.fixture
def every_answer_counts(monkeypatch):
    monkeypatch.setattr(heads, "RIGHT", -1.0)


def eager_attention(model, ids):
    """Per layer [H, n]: what the last of the tokens attends to, from transformers."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = model(torch.tensor([ids]), output_attentions=True)
    finally:
        model.set_attn_implementation(before)
    return [weights[0, :, -1] for weights in out.attentions], int(out.logits[0, -1].argmax())


def plain_copy(layers, ids, token, needle):
    rows = []
    for weights in layers:
        row = []
        for head in weights.tolist():
            top = max(range(len(head)), key=lambda i: head[i])
            row.append(1 / len(needle) if top in needle and ids[top] == token else 0.0)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def plain_reason(layers, ids, token, needle):
    rows = []
    for weights in layers:
        row = []
        for head in weights.tolist():
            best = sorted(range(len(head)), key=lambda i: -head[i])[: len(needle)]
            row.append(sum(head[i] for i in best if i in needle) / len(needle))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(10))
def test_both_scores_equal_a_plain_loop(seed):
    draw = torch.Generator().manual_seed(seed)
    layers = [(4 * torch.randn(5, 40, generator=draw)).softmax(-1) for _ in range(3)]
    ids = torch.randint(0, 3, (40,), generator=draw)
    for needle in (range(3, 20), range(30, 31), range(40)):
        plain = layers, ids.tolist(), 1, needle
        assert torch.equal(retrieval_score(layers, ids, 1, needle), plain_copy(*plain))
        torch.testing.assert_close(reasoning_score(layers, ids, 1, needle), plain_reason(*plain))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3"])
def test_the_attention_is_that_of_the_query_that_chose_each_token(architecture):
    model = models.tiny(architecture)
    managed = kvtrim.Cache(model, "full").managed
    ids = models.prompt(30)[0].tolist()
    read = list(ids)
    with kvtrim.attach(model):
        steps = list(answer(model, ids, 5))
    for token, layers in steps:
        expected, chosen = eager_attention(model, read)
        assert token == chosen
        for weights, layer in zip(layers, managed, strict=True):
            torch.testing.assert_close(weights.double(), expected[layer], atol=1e-5, rtol=1e-4)
        read.append(token)


def test_a_measurement_equals_a_plain_loop(llama, every_answer_counts):
    plan = Plan(puzzle="one-step", prompts=2, lengths=LENGTHS, seed=5)
    got = measure(llama, models.tokenizer(), plan)
    assert (got.layers, got.heads, got.counted) == (3, 6, 2)
    assert list(got.table) == [f"{layer}-{head}" for layer in range(3) for head in range(6)]
    for number in range(2):
        draw = random.Random(f"5-{number}")
        riddle = haystack.riddle("one-step", draw)
        depth = (0.5 + number * 0.6180339887) % 1
        planted = plant(models.tokenizer(), riddle, haystack.filler(draw), LENGTHS[number], depth)
        read, total = list(planted.ids), torch.zeros(3, 6, dtype=torch.float64)
        for _ in range(planted.steps):
            layers, token = eager_attention(llama, read)
            total += plain_reason(layers, read, token, planted.needle)
            read.append(token)
            if token == models.tokenizer().eos_token_id:
                break
        column = torch.tensor([lists[number] for lists in got.table.values()])
        torch.testing.assert_close(column.view(3, 6).double(), total, atol=1e-5, rtol=1e-4)


def test_copying_from_the_needle_is_noticed():
    """A head that looks at the needle's next token, while that very token is generated."""
    ids = torch.tensor([5, 6, 7, 8, 9, 5, 6])
    looks = torch.eye(7)[[2, 6]]  # one head looks at slot 2, the other at the newest
    assert retrieval_score([looks], ids, 7, range(1, 5)).tolist() == [[0.25, 0.0]]
    assert retrieval_score([looks], ids, 8, range(1, 5)).tolist() == [[0.0, 0.0]]
    assert retrieval_score([looks], ids, 7, range(3, 5)).tolist() == [[0.0, 0.0]]
    assert reasoning_score([looks], ids, 8, range(1, 5)).tolist() == [[0.25, 0.0]]


def test_a_random_model_copies_nothing_which_is_no_table(llama, every_answer_counts):
    with pytest.raises(ModelError, match="2 of 2 prompts were answered right, and no head scored"):
        measure(llama, models.tokenizer(), Plan(score="copy", prompts=2, lengths=LENGTHS))


def test_a_model_that_answers_nothing_right_is_refused(llama):
    with pytest.raises(ModelError, match="0 of 2 prompts were answered right"):
        measure(llama, models.tokenizer(), Plan(prompts=2, lengths=LENGTHS))


def test_prompts_longer_than_the_window_are_refused(llama):
    with pytest.raises(UsageError, match=r"prompts of 500 \+ 64 tokens exceed the window, 512"):
        measure(llama, models.tokenizer(), Plan(lengths=(500,)))
    with pytest.raises(UsageError, match="no room for filler"):
        measure(llama, models.tokenizer(), Plan(lengths=(200,)))


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_needle_is_where_the_prompt_says(kind, chat):
    tokenizer = models.tokenizer()
    for seed, depth in ((0, 0.0), (1, 0.5), (2, 1.0)):
        draw = random.Random(seed)
        riddle = haystack.riddle(kind, draw)
        planted = plant(tokenizer, riddle, haystack.filler(draw), 1200, depth, chat)
        assert 1000 < len(planted.ids) <= 1200
        found = tokenizer.decode([planted.ids[i] for i in planted.needle])
        assert found.strip() == riddle.needle
        text = tokenizer.decode(planted.ids)
        assert text.endswith(riddle.lead) and riddle.question in text
        assert tokenizer.decode(planted.ids[: planted.needle.stop]).count(riddle.needle) == 1
        assert riddle.answer in riddle.needle
        middle = planted.needle.start / len(planted.ids)
        assert abs(middle - depth) < 0.35
        assert planted.steps == len(riddle.answer) + 1, "a byte is a token here"


def test_riddles_and_filler_follow_from_the_seed_and_differ_between_seeds():
    def made(seed):
        draw = random.Random(seed)
        return [haystack.riddle(kind, draw) for kind in KINDS], list(
            islice(haystack.filler(draw), 50)
        )

    assert made(1) == made(1)
    assert made(1) != made(2)
    assert len(set(made(1)[1])) > 45


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_riddle_asks_for_is_not_in_the_filler(kind):
    draw = random.Random(0)
    text = " ".join(islice(haystack.filler(draw), 3000)).lower()
    for _ in range(200):
        riddle = haystack.riddle(kind, draw)
        assert riddle.answer not in text
        assert riddle.answer != riddle.decoy
        told = riddle.before + riddle.needle + riddle.after
        assert riddle.decoy is None or (riddle.decoy in told and riddle.decoy not in riddle.needle)


def test_a_text_of_your_own_serves_as_haystack():
    source = haystack.sentences("One. Two three. Four.", random.Random(0))
    assert set(islice(source, 6)) == {"One.", "Two three.", "Four."}
    with pytest.raises(UsageError, match="at least two sentences"):
        next(haystack.sentences("No end", random.Random(0)))


@pytest.mark.parametrize(
    ("answer", "expected", "recall", "f1"),
    [
        ("golden falcon", "golden falcon", 1, 1),
        ("The Golden, falcon!", "golden falcon", 1, 1),
        ("a golden egg", "golden falcon", 0.5, 0.5),
        ("", "golden falcon", 0, 0),
        ("golden golden", "golden falcon", 0.5, 0.5),
        ("climb the hill and sing", "climb the hill", 1, 2 * 2 / (4 + 2)),
    ],
)
def test_answers_are_compared_word_by_word(answer, expected, recall, f1):
    assert rouge1_recall(answer, [expected]) == pytest.approx(recall)
    assert token_f1(answer, [expected]) == pytest.approx(f1)
