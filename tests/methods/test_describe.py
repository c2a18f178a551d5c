"""What kvtrim says of its methods: complete, read off the code, and current in docs/methods.md."""

from dataclasses import dataclass, fields
from pathlib import Path

import pytest

import kvtrim
from kvtrim.methods.budgets import BUDGETS
from kvtrim.methods.describe.entries import describe, entry
from kvtrim.methods.describe.markdown import manual, section
from kvtrim.methods.describe.sources import meanings_of, text_of
from kvtrim.methods.method import Method
from kvtrim.methods.policies.base import Policy
from kvtrim.methods.policies.h2o import H2O
from kvtrim.methods.policies.knorm import KNorm
from kvtrim.methods.policies.snapkv import SnapKV
from kvtrim.methods.propagation import PROPAGATIONS
from kvtrim.methods.schedule import Schedule
from kvtrim.methods.settings import UNITS, find, parameters

METHODS = sorted(kvtrim.METHODS)
ROOT = Path(__file__).parents[2]


def test_every_method_says_where_it_is_from_when_to_use_it_and_what_it_costs():
    """One sentence each, in `source`, `use` and `cost` of its entry in METHODS."""
    wanting = {}
    for name, method in kvtrim.METHODS.items():
        missing = ["source"] if not method.source else []
        for field in ("use", "cost"):
            said = getattr(method, field)
            if not (said and len(said) <= 120 and said.endswith(".") and "\n" not in said):
                missing.append(field)
        if missing:
            wanting[name] = missing
    assert not wanting, f"write one sentence of at most 120 characters for {wanting}"


def test_the_page_of_methods_is_current():
    written = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert written == manual(), "docs/methods.md is stale: run `make docs`"


def test_parts_that_every_method_shares_explain_all_their_parameters():
    parts = [*BUDGETS.values(), *UNITS.values(), *PROPAGATIONS.values()]
    for owner in (Method, Schedule, *parts):
        apart = {"policy", "budget", "schedule", "propagation", "unit", "source", "presets"}
        names = {field.name for field in fields(owner)} - apart
        assert names <= meanings_of(owner).keys(), owner.__name__


@pytest.mark.parametrize("owner", [*BUDGETS.values(), *UNITS.values(), *PROPAGATIONS.values()])
def test_every_part_opens_with_one_sentence(owner):
    summary = text_of(owner).summary
    assert summary.endswith(".") and len(summary) <= 200


def test_a_docstring_is_taken_apart():
    text = text_of(H2O)
    assert text.summary == (
        "H2O: a token is a heavy hitter when all queries so far attended to it a lot."
    )
    assert text.body == "" and set(text.labels) == {"Rule", "Paper", "Code", "Ours"}
    assert text.labels["Rule"].startswith("the score of a slot is the softmax attention it rec")
    assert "\n" not in text.labels["Code"] and "  " not in text.labels["Code"]


class Written:
    """Written: its own sentence
    goes on.

    Free text stays as it is:

        score = q . k

    Paper: one, continued
           here.
    Paper: and a second.

    More text. Nota bene: no label.
    """


def test_free_text_and_repeated_labels():
    text = text_of(Written)
    assert text.summary == "Written: its own sentence goes on."
    assert text.labels == {"Paper": "one, continued here. and a second."}
    assert text.body.startswith("Free text stays as it is:\n\n    score = q . k")
    assert text.body.endswith("More text. Nota bene: no label.")


@dataclass(frozen=True)
class Base:
    inherited: int = 0
    """What a base class says. It has a second sentence."""


@dataclass(frozen=True)
class Mine(Base):
    one: int = 1  # a comment, with a # inside
    two: int = 2  # a comment that
    # goes on
    silent: str = "# not a comment"
    inherited: int = 3


def test_the_meaning_of_a_parameter_is_its_comment_or_that_of_a_base():
    assert meanings_of(Mine) == {
        "one": "a comment, with a # inside",
        "two": "a comment that goes on",
        "inherited": "what a base class says. It has a second sentence",
    }
    sinks = "first slots of the prompt that are kept whatever their score"
    assert meanings_of(KNorm)["sinks"] == meanings_of(Policy)["sinks"] == sinks


def test_nothing_is_known_where_the_source_is_not_at_hand():
    made = type("Made", (Policy,), {"__doc__": "Made: at run time."})
    assert "sinks" in meanings_of(made)
    assert text_of(made).summary == "Made: at run time."


@pytest.mark.parametrize("name", METHODS)
def test_defaults_are_written_as_they_are_set(name):
    told, method = entry(name), kvtrim.METHODS[name]
    assert {p.path for p in told.parameters} == set(parameters(method))
    for parameter in told.parameters:
        assert find(name, **{parameter.path: parameter.default}) == method, parameter


def test_presets_say_what_they_change():
    assert entry("adakv").presets["kvpress"] == (
        "window 32 → 64, kernel 7 → 5, pool max → avg, group_order before → after, "
        "rule blend → floor"
    )
    assert entry("streaming-llm").presets["kvf"] == ""
    mine = Method(
        KNorm(), presets={"two": {"budget": "per-head", "policy": "snapkv", "layers": "pyramid"}}
    )
    assert (
        describe("mine", mine)
        .presets["two"]
        .startswith("policy KNorm → SnapKV, budget Uniform → PerHead, window 0 → 32")
    )
    assert "layers pyramid" in describe("mine", mine).presets["two"]


def test_a_method_that_says_nothing_of_itself_can_be_shown():
    page = section(describe("mine", Method(SnapKV())))
    assert "When to use it" not in page and "Cost" not in page
    assert "**Score.** SnapKV: a past token" in page


def test_the_page_links_papers_and_tables_survive_bars():
    page = manual()
    assert "[arXiv 2404.14469](https://arxiv.org/abs/2404.14469)" in page
    assert "none \\| avg \\| max" in page
    for name in METHODS:
        assert f"[{name}](#{name})" in page and f"\n## {name}\n" in page
