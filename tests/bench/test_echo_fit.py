"""Fitting echo: sums instead of tokens, the ridge chosen on texts that were held out."""

import random

import pytest
import torch

import kvtrim
import models
from kvtrim.bench.calibrate import echo, echo_texts
from kvtrim.errors import UnsupportedModelError, UsageError
from kvtrim.hf.replay import record
from kvtrim.methods import echo_tables

PLAN = echo.Plan(length=150, tokens=900)


def texts(count=7, characters=150):
    draw = random.Random(3)
    words = "sea boat map star coin bell door lamp rope tide".split()
    return {
        f"text {number}": " ".join(draw.choice(words) for _ in range(characters))[:characters]
        for number in range(count)
    }


def test_sums_give_what_the_tokens_themselves_give():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(90, 5, generator=draw, dtype=torch.float64) * torch.tensor([1, 9, 1, 1, 0.1])
    x = x + torch.arange(5)
    y = torch.randn(90, 2, generator=draw, dtype=torch.float64) + x[:, :2] - 7
    sums = echo.Sums.empty(5, 2)
    for part in range(0, 90, 20):
        sums.add(x[part : part + 20], y[part : part + 20])
    standard = (x - x.mean(0)) / x.std(0, correction=0)
    rows = torch.cat([standard, (0.3 * 90) ** 0.5 * torch.eye(5, dtype=torch.float64)])
    wanted = torch.cat([y - y.mean(0), torch.zeros(5, 2, dtype=torch.float64)])
    own = torch.linalg.lstsq(rows, wanted).solution
    found = sums.solve(0.3)
    for head in range(2):
        for token in range(0, 90, 13):
            expected = float(standard[token] @ own[:, head] + y[:, head].mean())
            assert float(x[token] @ found[:-1, head] + found[-1, head]) == pytest.approx(expected)
        error = y[:, head] - (x @ found[:-1, head] + found[-1, head])
        spread = y[:, head] - y[:, head].mean()
        expected = 1 - float((error**2).sum() / (spread**2).sum())
        assert float(sums.r2(found)[head]) == pytest.approx(expected)


def test_a_weight_counts_as_so_many_tokens():
    draw = torch.Generator().manual_seed(1)
    x, y = (torch.randn(40, n, generator=draw, dtype=torch.float64) for n in (4, 2))
    times = torch.randint(0, 4, (40,), generator=draw)
    weighed, repeated = echo.Sums.empty(4, 2), echo.Sums.empty(4, 2)
    weighed.add(x, y, times)
    repeated.add(x.repeat_interleave(times, dim=0), y.repeat_interleave(times, dim=0))
    for found, wanted in zip(vars(weighed).values(), vars(repeated).values(), strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_token_counts_by_the_root_of_its_score(llama):
    recording, sums = record(llama, models.prompt(40)), []
    echo._add(sums, recording, PLAN)
    scores = echo.scores_of(recording, "kvzip")[1][:, 4:] + echo.LEAST
    assert sums[1].count == pytest.approx(float(scores.sqrt().mean(dim=0).sum()), rel=1e-5)


def test_a_fit_foretells_the_scores_of_the_probe(llama):
    fitted = echo.fit(llama, models.tokenizer(), PLAN, texts())
    assert fitted.table.weight.shape == (3, 2, 48) and fitted.explained.shape == (3, 2)
    held_out = [number in (1, 5) for number in range(7)]
    assert [x["held_out"] for x in fitted.texts] == held_out
    assert [x["tokens"] for x in fitted.texts] == [150, 150, 75, 150, 64, 150, 150]
    assert fitted.tried[fitted.ridge] == max(fitted.tried.values())
    assert float(fitted.explained.mean()) == pytest.approx(fitted.tried[fitted.ridge])
    assert float(fitted.explained.mean()) > 0.05
    first, end, asked = (
        float(x.mean()) for x in (fitted.explained, fitted.second["end"], fitted.second["asked"])
    )
    assert asked > end > first


def test_sums_of_a_view_are_those_of_what_it_shows():
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, n, generator=draw, dtype=torch.float64) for n in (4, 2))
    view = torch.randn(5, 3, generator=draw, dtype=torch.float64)
    view[:, -1] = torch.tensor([0, 0, 0, 0, 1])
    whole, shown = echo.Sums.empty(4, 2), echo.Sums.empty(2, 2)
    whole.add(x, y)
    shown.add(x @ view[:4, :-1] + view[4, :-1], y)
    for found, wanted in zip(
        vars(whole.seen_by(view)).values(), vars(shown).values(), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_a_model_whose_queries_cannot_be_turned_has_no_map_of_what_they_look_at(
    llama, monkeypatch
):
    def rotations(model):
        raise UnsupportedModelError("of another kind")

    monkeypatch.setattr(echo, "rotations", rotations)
    fitted = echo.fit(llama, models.tokenizer(), PLAN, texts())
    assert fitted.table.asked is None and fitted.table.end is not None
    assert set(fitted.second) == {"end"}


@pytest.mark.parametrize("target", ["kvzip", "kvzip-plus", "kvgrad"])
def test_what_is_foretold_is_what_the_method_of_that_name_scores_by(llama, target):
    """Keeping the best by these scores is that method with one budget over the model."""
    ids, keep = models.prompt(40), 12
    scores = torch.stack(echo.scores_of(record(llama, ids), target))
    cache = kvtrim.Cache(llama, target, keep)
    with torch.no_grad(), kvtrim.attach(llama):
        llama(ids, past_key_values=cache)
    best = scores[..., 4:].flatten().argsort(descending=True)[: 6 * (keep - 4)]
    chosen = torch.zeros(scores[..., 4:].numel(), dtype=torch.bool)
    chosen[best] = True
    chosen = chosen.view_as(scores[..., 4:])
    for layer, heads in enumerate(models.positions(cache)):
        for head, kept in enumerate(heads):
            assert kept[4:] == (chosen[layer, head].nonzero()[:, 0] + 4).tolist()


@pytest.mark.parametrize("target", ["kvzip", "kvzip-plus", "kvgrad"])
def test_a_probe_that_is_noted_has_the_parameters_of_the_method(target):
    own = kvtrim.METHODS[target].policy
    noting = echo._take_notes(target)
    assert {name: getattr(noting, name) for name in vars(own)} == vars(own)


@pytest.mark.parametrize("target", ["kvzip-plus", "kvgrad"])
def test_scores_that_are_no_attention_are_made_as_large(llama, target):
    scores = torch.stack(echo.scores_of(record(llama, models.prompt(60)), target))[..., 4:]
    assert float((scores > 0.5).double().mean()) == pytest.approx(echo.FEW, abs=0.01)


def test_one_text_cannot_be_held_out(llama):
    with pytest.raises(UsageError, match="at least two"):
        echo.fit(llama, models.tokenizer(), PLAN, texts(1) | {"short": "a" * 60})


def test_a_record_says_what_was_fitted_on_what(llama, tmp_path):
    fitted = echo.fit(llama, models.tokenizer(), PLAN, texts())
    written = echo.fit_record(llama, models.tokenizer(), "tiny", PLAN, fitted)
    path = tmp_path / "tiny.safetensors"
    echo_tables.write(path, fitted.table, written)
    kept = echo_tables.record_of(path)
    assert kept["identity"] and kept["target"] == "kvzip" and kept["read"] == 889
    assert (
        len(kept["explained"]) == len(kept["explained_asked"]) == 3 and kept["texts"][0]["sha256"]
    )
    table = echo_tables.read(str(path))
    torch.testing.assert_close(table.weight, fitted.table.weight)
    torch.testing.assert_close(table.bias, fitted.table.bias)
    torch.testing.assert_close(table.lengths, fitted.table.lengths)
    torch.testing.assert_close(table.asked.weight, fitted.table.asked.weight)
    torch.testing.assert_close(table.end.bias, fitted.table.end.bias)


def test_made_texts_are_of_several_kinds_and_the_same_again(llama):
    made = echo_texts.compose(100, seed=1)
    assert made == echo_texts.compose(100, seed=1) != echo_texts.compose(100, seed=2)
    assert {name.split()[0] for name in made} == {"documentation", "code", "records", "facts"}
    own = echo_texts.write(llama, models.tokenizer(), 12)
    assert own == echo_texts.write(llama, models.tokenizer(), 12)
    turns = list(echo_texts.mix(own, made))
    kinds = {"own", "documentation", "code", "records", "facts"}
    assert {name.split()[0] for name in turns[:5]} == kinds
    assert sorted(turns) == sorted([*own, *made])
