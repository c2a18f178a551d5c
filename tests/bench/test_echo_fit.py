"""Fitting echo: sums instead of tokens, the ridge chosen on texts that were held out."""

import random

import pytest
import torch

import kvtrim
import models
from kvtrim.bench.calibrate import echo, echo_texts
from kvtrim.errors import UsageError
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


def test_a_fit_foretells_the_scores_of_the_probe(llama):
    fitted = echo.fit(llama, models.tokenizer(), PLAN, texts())
    assert fitted.table.weight.shape == (3, 2, 48) and fitted.explained.shape == (3, 2)
    assert [x["held_out"] for x in fitted.texts] == [False, True, False, False, False, True]
    assert sum(x["tokens"] for x in fitted.texts) == PLAN.tokens
    assert fitted.tried[fitted.ridge] == max(fitted.tried.values())
    assert float(fitted.explained.mean()) == pytest.approx(fitted.tried[fitted.ridge])
    assert float(fitted.explained.mean()) > 0.05


@pytest.mark.parametrize("target", ["kvzip", "kvzip-plus"])
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


def test_one_text_cannot_be_held_out(llama):
    with pytest.raises(UsageError, match="at least two"):
        echo.fit(llama, models.tokenizer(), PLAN, texts(1) | {"short": "a" * 60})


def test_a_record_says_what_was_fitted_on_what(llama, tmp_path):
    fitted = echo.fit(llama, models.tokenizer(), PLAN, texts())
    written = echo.fit_record(llama, models.tokenizer(), "tiny", PLAN, fitted)
    path = tmp_path / "tiny.safetensors"
    echo_tables.write(path, fitted.table, written)
    kept = echo_tables.record_of(path)
    assert kept["identity"] and kept["target"] == "kvzip" and kept["read"] == PLAN.tokens
    assert len(kept["explained"]) == 3 and kept["texts"][0]["sha256"]
    table = echo_tables.read(str(path))
    torch.testing.assert_close(table.weight, fitted.table.weight)
    torch.testing.assert_close(table.bias, fitted.table.bias)


def test_made_texts_are_of_several_kinds_and_the_same_again(llama):
    made = echo_texts.compose(100, seed=1)
    assert made == echo_texts.compose(100, seed=1) != echo_texts.compose(100, seed=2)
    assert {name.split()[0] for name in made} == {"documentation", "code", "records"}
    own = echo_texts.write(llama, models.tokenizer(), 12)
    assert own == echo_texts.write(llama, models.tokenizer(), 12)
    turns = list(echo_texts.mix(own, made))
    assert {name.split()[0] for name in turns[:4]} == {"own", "documentation", "code", "records"}
    assert sorted(turns) == sorted([*own, *made])
