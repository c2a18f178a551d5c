"""FastKV's analyses against plain loops, masks on the untouched model, and hand-made cases."""

from dataclasses import replace

import pytest
import subjects
import torch

import models
import oracles
from kvtrim.bench.analyses import base, fastkv, prompts, propagation
from kvtrim.bench.calibrate import tsp
from kvtrim.bench.eval.evaluate import Subject as Evaluated
from kvtrim.errors import UsageError
from kvtrim.prompts.document import Document
from kvtrim.tasks.base import Sample, Task

WINDOW, RATE = subjects.WINDOW, 0.4


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_mass_is_that_of_each_layers_own_top_tokens(architecture):
    model = models.tiny(architecture)
    given = subjects.asked(model, 40, 53)
    found = fastkv.mass(given)
    expected = {layer: [] for layer in range(3)}
    for number in range(2):
        for layer, call in enumerate(subjects.calls_of(model, subjects.ids_of(given, number))):
            means = subjects.weights_of(call, WINDOW).mean(dim=(0, 1)).tolist()
            order, n = sorted(means, reverse=True), len(means)
            tops = [sum(order[: -(-int(100 * share) * n // 100)]) for share in fastkv.SHARES]
            needed = next(c for c in range(1, n + 1) if sum(order[:c]) >= 0.9 - 1e-12)
            expected[layer].append([*tops, sum(means[:4]), needed / n])
    for row in found.rows:
        own = torch.tensor(expected[row[0]]).mean(dim=0)
        assert torch.tensor(row[1:]) == pytest.approx(own, rel=1e-5), row


def test_overlap_counts_tokens_that_both_layers_would_send_on():
    model = models.tiny()
    given = subjects.asked(model, 45, 38, rates=(RATE,))
    found = fastkv.overlap(given)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for number in range(2):
        sets = [
            _sent_on(call) for call in subjects.calls_of(model, subjects.ids_of(given, number))
        ]
        for one in range(3):
            for other in range(3):
                expected[one, other] += len(sets[one] & sets[other]) / len(sets[one]) / 2
    assert torch.tensor(found.more["matrix"]) == pytest.approx(expected)
    assert found.rows[0][1] == pytest.approx(float(expected[0, 1]))
    assert found.rows[0][2] == pytest.approx(float(expected[0, 1:].mean()))
    assert found.rows[2][1] is None


def _sent_on(call):
    """The tokens that fastkv sends on: max pool of seven, window of eight, sum over heads."""
    weights = subjects.weights_of(call, 8)
    n = weights.shape[-1]
    scores = [0.0] * (n - 8)
    for head in weights.sum(1)[:, : n - 8].tolist():
        for slot in range(n - 8):
            scores[slot] += max(head[max(0, slot - 3) : slot + 4])
    return {*oracles.top(scores, int(n * RATE) - 8), *range(n - 8, n)}


def test_distances_are_those_of_the_calibration_and_the_map_is_the_seeds():
    pytest.importorskip("sklearn")
    model = models.tiny()
    given = subjects.asked(model, 45, 38, 51, rates=(RATE,))
    found = fastkv.tsne(given)
    ids = [subject.given.ids for subject in given.subjects]
    curve = tsp.measure(model, ids, RATE)  # checked against masks in its own tests
    for row, point in zip(found.rows, curve, strict=True):
        assert row[:2] == [point.layer, pytest.approx(point.distance, rel=1e-3)]
        assert row[2:4] == pytest.approx([min(point.distances), max(point.distances)], rel=1e-3)
        assert row[4] == pytest.approx(point.kl, rel=1e-3)
    assert len(found.more["tsne"]) == 3 * 2 + 3
    assert fastkv.tsne(given).more["tsne"] == found.more["tsne"]
    with pytest.raises(UsageError, match="the layers are 0 to 1"):
        fastkv.tsne(replace(given, layers=(7,)))


def test_propagation_scores_losses_and_times():
    model = models.tiny()
    model.generation_config.eos_token_id = None
    said = []

    def score(answer, sample):
        said.append(answer)
        return float(len(answer) > 0)

    def samples(request):
        text = Document.of("A cat sat on a mat and looked at the sea. " * 3)
        yield Sample("one", text, " Who?", ("cat",), group={})

    task = Task("cats", 1, "", "", "", 4, samples, score, chat=False)
    tokenizer = models.tokenizer()
    own = prompts.of_tasks(Evaluated("tiny", model, tokenizer), [task], lambda _: [], [], 1)
    given = base.Asked("tiny", model, tokenizer, own, rates=(0.3, 1.0), layers=(0, 1))
    found = propagation.propagation(given)
    assert [row[1:3] for row in found.rows] == [
        ["full", None],
        ["30%", 0],
        ["30%", 1],
        ["100%", 0],
        ["100%", 1],
    ]
    losses = [row[5] for row in found.rows]
    whole = own[0].given.ids + own[0].given.gold
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    gold, n = own[0].given.gold, len(own[0].given.ids)
    picked = [-float(logits[n + at - 1, token]) for at, token in enumerate(gold) if at >= 1]
    assert losses[0] == pytest.approx(sum(picked) / len(picked), rel=1e-5)
    assert losses[3:] == pytest.approx([losses[0]] * 2, rel=1e-6)  # all tokens go on
    assert abs(losses[1] - losses[0]) > 1e-6
    assert all(row[6] > 0 for row in found.rows) and found.rows[0][7] == 1
    assert said and {row[4] for row in found.rows} == {1.0}
    assert len(found.panels) == found.across == 3
    for panel in found.panels:
        assert [one["label"] for one in panel["series"]] == ["full", "rate 30%", "rate 100%"]
        assert panel["ticks"] == [0, 1] and all(one["x"] == [0, 1] for one in panel["series"])
    assert found.panels[1]["series"][1]["y"] == losses[1:3]


def test_each_length_has_figures_of_its_own_beside_its_full_prefill(monkeypatch):
    model, tokenizer = models.tiny(), models.tokenizer()

    def answered(asked, subject, layer, rate):
        length = subject.given.sample.group["length"]
        return 1.0, None if length == 90 else length + (rate or 0), 1.0 + (layer or 0)

    def samples(request):
        text = Document.of("A cat sat on a mat and looked at the sea. " * 3)
        yield Sample("one", text, " Who?", ("cat",), group={"length": request.length})

    monkeypatch.setattr(propagation, "_answer", answered)
    task = Task("cats", 1, "", "", "", 4, samples, lambda answer, sample: 1.0, chat=False)
    subject = Evaluated("tiny", model, tokenizer)
    own = prompts.of_tasks(subject, [task], lambda _: [], [90, 120], 1)
    given = base.Asked("tiny", model, tokenizer, own, rates=(0.2, 0.4), layers=(1, 0))
    found = propagation.propagation(given)
    assert [panel["title"] for panel in found.panels] == [
        f"{what}, prompts of {length} tokens"
        for length in (90, 120)
        for what in ("Score", "Loss of the right answer", "Time to first token")
    ]
    none, losses, times = (found.panels[at]["series"] for at in (1, 4, 5))
    assert none == [] and [one["y"] for one in losses] == [[120] * 2, [120.2] * 2, [120.4] * 2]
    assert [one["y"] for one in times] == [[1, 1], [1, 2], [1, 2]]
