"""auto becomes what was measured best, says why, and is saved under that name."""

import re

import pytest
import torch

import kvtrim
import models
from kvtrim.errors import UsageError
from kvtrim.hf.models import fingerprint
from kvtrim.hf.replay import record
from kvtrim.methods import auto, echo_tables
from kvtrim.methods.budgets import head_scores
from kvtrim.methods.describe.entries import entry
from kvtrim.methods.describe.markdown import section
from kvtrim.methods.echo_tables import EchoTable
from kvtrim.methods.registry import METHODS
from kvtrim.methods.settings import find

N = 60
AGNOSTIC = {"context": [(0, N)]}
AWARE = {"context": [(0, 40)], "question": [(40, N)]}


@pytest.fixture
def tables(llama, tmp_path, monkeypatch):
    """Tables that come with kvtrim, of this very model."""
    monkeypatch.setattr(echo_tables, "SHIPPED", tmp_path)
    monkeypatch.setattr(head_scores, "SHIPPED", tmp_path)
    own = {"identity": fingerprint.identity(llama)}
    maps = EchoTable(torch.randn(3, 2, 48) / 8, torch.zeros(3, 2))
    echo_tables.write(tmp_path / "tiny.safetensors", maps, own)
    scores = {f"{layer}-{head}": [1.0 + head] for layer in range(3) for head in range(6)}
    head_scores.write(tmp_path / "heads.json", scores, own)


def chosen(model, spans):
    return kvtrim.Cache(model, "auto", 40, spans=spans).choice


def test_without_tables_it_takes_what_needs_none(llama):
    assert chosen(llama, AGNOSTIC).name == "kvzip"
    assert "read twice" in chosen(llama, AGNOSTIC).why
    assert "calibrate echo" in chosen(llama, AGNOSTIC).why
    assert chosen(llama, AWARE).name == chosen(llama, None).name == "adakv"
    assert chosen(llama, AGNOSTIC | {"question": []}).name == "kvzip"  # what one was cut out of


@pytest.mark.usefixtures("tables")
def test_with_tables_of_the_model_it_takes_what_they_serve(llama, tmp_path):
    assert chosen(llama, AGNOSTIC).name == "echo" and "tiny" in chosen(llama, AGNOSTIC).why
    for spans in (AWARE, None):
        own = chosen(llama, spans)
        assert own.label == "echo-window:refit=values+bias" and "tiny" in own.why
    (tmp_path / "tiny.safetensors").unlink()
    assert chosen(llama, AWARE).name == chosen(llama, None).name == "headkv"
    (tmp_path / "heads.json").unlink()
    assert chosen(llama, AWARE).name == "adakv"


def test_its_page_says_what_it_becomes_and_claims_nothing_of_that():
    """A method's budget and parameters are its own; auto has none."""
    page = section(entry("auto"))
    for case in auto.CASES:
        assert f"`{case.becomes}`" in page and METHODS[case.becomes.name]
    agnostic, aware = (
        re.search(rf"\*\*{name}\.\*\* (.*)", page)[1]
        for name in ("Question-agnostic", "Question-aware")
    )
    assert agnostic == (
        "`echo:refit=values+bias` where a table of echo is here, else `kvzip:refit=values+bias`."
    )
    assert aware.endswith(
        "else `headkv` where a table of the model's heads is here, else `adakv`."
    )
    assert "[choosing.md](choosing.md)" in page and "|" not in page
    assert not any(f"**{label}." in page for label in ("Score", "Budget", "Keeps", "Evicts"))
    record = entry("auto").full_record()
    assert record["parameters"] == {} and "Uniform" not in str(record)


@pytest.mark.usefixtures("tables")
def test_tables_of_other_weights_are_no_tables():
    other = models.tiny("llama", seed=7)
    assert chosen(other, AGNOSTIC).name == "kvzip" and chosen(other, AWARE).name == "adakv"


@pytest.mark.usefixtures("tables")
def test_it_keeps_what_its_choice_keeps_and_is_saved_as_that(llama, tmp_path):
    ids = models.prompt(N)
    refit = {"refit": "values+bias"}
    caches = [kvtrim.Cache(llama, "auto", 20, spans=AGNOSTIC)]
    caches += [kvtrim.Cache(llama, "echo", 20, spans=AGNOSTIC, **refit)]
    with torch.no_grad(), kvtrim.attach(llama):
        for cache in caches:
            llama(ids, past_key_values=cache)
    assert models.positions(caches[0]) == models.positions(caches[1])
    assert models.positions(record(llama, ids, AGNOSTIC).cache("auto", 20)) == models.positions(
        caches[1]
    )
    for own, other in zip(*(c.session.state.stores() for c in caches), strict=True):
        dense, same = (store.row(0).dense()[0] for store in (own, other))
        assert "bias" in dense
        torch.testing.assert_close(dense, same)
    caches[0].save(tmp_path / "cache")
    again = kvtrim.load_cache(tmp_path / "cache", llama)
    assert again.request.name == "echo" and again.choice is None
    assert again.request.settings == refit and again.method == caches[1].method


def test_from_queries_alone_it_is_that_of_a_known_question():
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(6, 90, 8, generator=draw), torch.randn(2, 90, 8, generator=draw)
    kept = [kvtrim.select(name, q, k, k, keep=50) for name in ("auto", "adakv")]
    assert all(torch.equal(a, b) for a, b in zip(kept[0][0], kept[1][0], strict=True))


@pytest.mark.parametrize("protocol", ["question-aware", "question-agnostic"])
def test_an_answer_says_what_auto_became_and_why(llama, protocol):
    given = {"method": "auto", "keep": 90, "max_new_tokens": 2, "protocol": protocol}
    text = "The boat came late and the bell rang. " * 5
    result = kvtrim.generate(llama, models.tokenizer(), text, "When?", **given)
    name = "adakv" if protocol == "question-aware" else "kvzip"
    label = name if protocol == "question-aware" else f"{name}:refit=values+bias"
    assert result.method == name and result.answers[0].remark.startswith(f"auto is {label}: ")


def test_settings_are_refused_since_nobody_knows_whose_they_are(llama):
    with pytest.raises(UsageError, match="auto takes no settings"):
        kvtrim.Cache(llama, "auto", 20, every=4)
    for settings in ({"every": 4}, {"window": 8}, {"policy.window": 8}):
        with pytest.raises(UsageError, match="auto takes no settings"):
            kvtrim.generate(llama, models.tokenizer(), "a text", "?", method="auto", **settings)
    with pytest.raises(TypeError):
        find("auto").policy.score(None)
    assert auto.NAME not in kvtrim.METHODS
