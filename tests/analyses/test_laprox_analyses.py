"""LaProx's analyses against masks on the untouched model, and plain loops."""

from functools import partial

import pytest
import subjects
import torch

import kvtrim
import models
import oracles
from kvtrim.bench.analyses import laprox, passes
from kvtrim.bench.candidates import Candidate

WINDOW = subjects.WINDOW
SNAPKV = Candidate("snapkv", "20", {"window": WINDOW})


@pytest.mark.parametrize("question", [0, 3])
def test_cosines_are_those_of_a_model_that_masks_what_was_evicted(question):
    model = models.tiny()
    given = subjects.asked(
        model, 40, question=question, aware=not question, cells=(SNAPKV, Candidate("full"))
    )
    found = laprox.cosine(given)
    one = next(iter(passes.passes(given)))
    with kvtrim.attach(model):
        after = laprox._continue(model, one)
    assert len(after) == 16 and after[:question] == one.question
    ids, n = torch.tensor([one.recording.ids[0].tolist() + after]), one.tokens
    seen = oracles.causal(n + 16).expand(1, 6, -1, -1).clone()
    masks = [seen.clone() for _ in range(3)]
    for mask, held in zip(masks, passes.kept_slots(one.cache(SNAPKV)), strict=True):
        mask[0, :, n:, :n] &= held.repeat_interleave(3, dim=0)[:, None]
    full, cut = (
        _outputs(model, ids, {i: m for i, m in enumerate(own)}) for own in ([seen] * 3, masks)
    )
    expected = [
        float(torch.cosine_similarity(a[n:], b[n:], dim=-1).mean())
        for a, b in zip(cut, full, strict=True)
    ]
    assert found.more["cosine"]["snapkv:window=8 20"] == pytest.approx(expected, rel=1e-6)
    assert found.more["cosine"]["full"] == pytest.approx([1.0] * 3)
    assert found.rows[0][2:] == pytest.approx([sum(expected) / 3, min(expected), expected[-1]])


def _outputs(model, ids, masks):
    """What every decoder layer of the untouched model gives."""
    states = []

    def keep(module, args, given):
        states.append((given[0] if isinstance(given, tuple) else given)[0])

    hooks = [layer.register_forward_hook(keep) for layer in model.model.layers]
    try:
        oracles.run_masked(model, ids, masks)
    finally:
        for hook in hooks:
            hook.remove()
    return states


def test_the_likeliest_tokens_follow_a_prompt_without_a_question():
    model = models.tiny()
    given = subjects.asked(model, 40)
    one = next(iter(passes.passes(given)))
    with kvtrim.attach(model):
        after = laprox._continue(model, one)
    ids = subjects.ids_of(given)
    for token in after:
        with torch.no_grad():
            assert int(model(ids).logits[0, -1].argmax()) == token
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_norms_of_columns_and_of_values_behind_the_projection():
    model = models.tiny()
    given = subjects.asked(model, 40)
    one = next(iter(passes.passes(given)))
    found = laprox.norms(given)
    for index, call in enumerate(subjects.calls_of(model, subjects.ids_of(given))):
        attention, value = laprox.both_norms(one.view(index), WINDOW)
        weights = subjects.weights_of(call, WINDOW)[..., : 40 - WINDOW]
        projection = model.model.layers[index].self_attn.o_proj.weight  # [M, H * D]
        for head in range(6):
            behind = call.values[0, head // 3] @ projection[:, 8 * head : 8 * head + 8].T
            assert torch.allclose(attention[head], weights[head].norm(dim=0), rtol=1e-6)
            assert torch.allclose(
                value[head].double(), behind.norm(dim=-1)[: 40 - WINDOW].double(), rtol=1e-4
            )
        sinks = value[:, :4].mean(-1) / value[:, 4:].mean(-1)
        assert found.rows[index][4] == pytest.approx(float(sinks.mean()), rel=1e-5)
        rho = passes.spearman(attention, value).mean()
        assert found.rows[index][1] == pytest.approx(float(rho), rel=1e-5)


def test_retained_tokens_are_those_of_select():
    model = models.tiny()
    cells = (
        Candidate("adakv", "30%", {"window": WINDOW}),
        Candidate("laprox", "30%", {"window": 8}),
    )
    given = subjects.asked(model, 40, 50, cells=cells)
    found = laprox.retention(given)
    select = partial(_selected, model, given)
    for cell in cells:
        counts = torch.stack([select(number, cell) for number in range(2)]).mean(dim=0)
        shown = torch.tensor(found.more["kept_percent"][cell.said])
        assert torch.allclose(shown.double(), counts)


def _selected(model, given, number, cell):
    calls = subjects.calls_of(model, subjects.ids_of(given, number))
    stacks = [[getattr(call, name)[0] for call in calls] for name in ("queries", "keys", "values")]
    output = [layer.self_attn.o_proj.weight for layer in model.model.layers]
    kept = kvtrim.select(
        cell.method, *stacks, keep=cell.keep, scale=calls[0].scale, output=output, **cell.settings
    )
    n = len(given.subjects[number].given.ids)
    return torch.tensor([[100 * len(head) / n for head in layer] for layer in kept]).double()
