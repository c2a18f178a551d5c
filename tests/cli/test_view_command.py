"""`kvtrim view` and `compare --html`."""

import json
import re
import sys

import pytest

from kvtrim.report.format import visible


def stops(path):
    found = re.search(r'id="data">(.*?)</script>', path.read_text("utf-8"))
    data = json.loads(found[1])
    return data, [(stop["method"], stop["keep"]) for stop in data["stops"]]


def test_a_file_is_shown_at_every_budget(run, tmp_path):
    code, out, err = run("view", "doc.txt", "--method", "knorm", "--keep", "1/4, 50%,1/4")
    assert (code, err) == (0, "") and "kept.html: " in out and "2 stops" in out
    data, found = stops(tmp_path / "kept.html")
    assert found == [("knorm", "25%"), ("knorm", "50%")] and data["question"] is None
    assert "Question-agnostic" in " ".join(data["about"])
    few, many = (sum(map(sum, stop["entries"])) for stop in data["stops"])
    assert many == pytest.approx(2 * few, rel=0.02)  # shares are rounded down


def test_a_question_is_asked_at_every_stop_and_with_the_full_cache(run, tmp_path):
    asked = ["-q", "Where?", "--max-new-tokens", "3", "--evidence", "wide blue", "-o", "k.html"]
    code, _, err = run("view", "doc.txt", "--method", "knorm", "--keep", "1/2", *asked)
    assert (code, err) == (0, "")
    data, found = stops(tmp_path / "k.html")
    assert found == [("full", "all"), ("knorm", "50%")]
    assert all(stop["logProb"].startswith("-") for stop in data["stops"])
    assert len(data["evidence"]) == 5 and data["question"] == "Where?"


def test_a_named_document_and_a_saved_cache_are_shown_as_they_are_held(run, tmp_path, monkeypatch):
    monkeypatch.setenv("KVTRIM_LIBRARY", str(tmp_path / "library"))
    made = ["--method", "knorm", "--keep", "40"]
    assert run("compress", "doc.txt", "--name", "doc", *made)[0] == 0
    assert run("compress", "doc.txt", "--out", "doc.kv", *made)[0] == 0
    asked = ["-q", "Where?", "--max-new-tokens", "3"]
    for given in (["@doc"], ["--cache", "doc.kv"]):
        assert run("view", *given, *asked)[0] == 0
        data, found = stops(tmp_path / "kept.html")
        assert found == [("full", "all"), ("knorm", "40")] and data["question"] == "Where?"
        held = [(stop["said"], stop["logProb"]) for stop in data["stops"]]
        anew = ["doc.txt", "--method", "knorm", "--keep", "40", *asked, "-o", "anew.html"]
        assert run("view", *anew)[0] == 0
        again = stops(tmp_path / "anew.html")[0]
        assert held == [(stop["said"], stop["logProb"]) for stop in again["stops"]]
        assert held[0] != held[1] and data["evidence"] == again["evidence"]
        assert run("view", *given)[0] == 0 and stops(tmp_path / "kept.html")[1] == [
            ("knorm", "40")
        ]
    code, _, err = run("view", "--cache", "doc.kv", "--keep", "1/2")
    assert code == 2 and "--keep was settled when doc.kv was made" in err
    assert run("view", "@doc", "--method", "full", "--method", "knorm", "--keep", "20%")[0] == 0
    assert stops(tmp_path / "kept.html")[1] == [("full", "all"), ("knorm", "20%")]


def test_budgets_go_by_their_older_name_too(run, tmp_path):
    asked = ["--method", "knorm", "--budget", "1/4", "--keep", "40"]
    assert run("view", "doc.txt", *asked)[0] == 0
    assert stops(tmp_path / "kept.html")[1] == [("knorm", "25%"), ("knorm", "40")]


OWN = """
from kvtrim.methods.method import Method
from kvtrim.methods.policies.knorm import KNorm

OWN, OTHER = Method(KNorm()), Method(KNorm())
"""


def test_a_method_of_ones_own_is_named_to_show_what_it_made(run, tmp_path, monkeypatch):
    monkeypatch.setenv("KVTRIM_LIBRARY", str(tmp_path / "library"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # a command adds the current folder
    (tmp_path / "mine.py").write_text(OWN)
    own, asked = ["--method", "mine:OWN"], ["-q", "Where?", "--max-new-tokens", "3"]
    assert run("compress", "doc.txt", "--name", "doc", *own, "--keep", "40")[0] == 0
    assert run("compress", "doc.txt", "--out", "doc.kv", *own, "--keep", "40")[0] == 0
    for given in (["@doc"], ["--cache", "doc.kv"]):
        code, _, err = run("view", *given)
        assert code == 1 and "--method mine:OWN" in err
        assert run("view", *given, *own)[0] == 0
        assert stops(tmp_path / "kept.html")[1] == [("mine:OWN", "40")]
        assert run("view", *given, *own, *asked)[0] == 0
        data, found = stops(tmp_path / "kept.html")
        assert found == [("full", "all"), ("mine:OWN", "40")]
        assert all(stop["logProb"].startswith("-") for stop in data["stops"])
    code, _, err = run("view", "--cache", "doc.kv", "--method", "mine:OTHER")
    assert code == 1 and "mine:OWN" in err
    code, _, err = run("view", "--cache", "doc.kv", "--method", "knorm")
    assert code == 2 and "--method was settled" in err
    for more in (["--method", "mine:OTHER", "--keep", "20%"], [*own, "--keep", "20%"]):
        assert run("view", "@doc", *more)[0] == 0  # its text, read anew
        assert stops(tmp_path / "kept.html")[1] == [(more[1], "20%")]
    sys.modules.pop("mine")


def test_compare_shows_what_it_compared(run, tmp_path):
    asked = ["-q", "Where?", "--max-new-tokens", "3", "--method", "knorm", "--keep", "40"]
    code, out, err = run("compare", "doc.txt", *asked, "--html", "c.html", "--json")
    assert code == 0 and "c.html shows what was kept" in err
    data, found = stops(tmp_path / "c.html")
    assert found == [("full", "all"), ("knorm", "40")]
    texts = [each["answers"][0]["text"] for each in json.loads(out)]
    assert [stop["said"] for stop in data["stops"]] == [visible(text) for text in texts]
    assert "Question-aware" in " ".join(data["about"])
    assert data["text"].count("Where?") == 1  # which was read with the document
    code, _, err = run("compare", "doc.txt", *asked, "--evidence", "cat")
    assert code == 2 and "--html" in err


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["doc.txt", "--cache", "doc.txt"], "not both"),
        (["--cache", "no.kv"], "no such cache file"),
        (["doc.txt", "-q", " "], "the question is empty"),
        (["doc.txt", "--keep", "2/1"], "more than the whole prompt"),
        (["doc.txt", "--keep", "some"], "is not a budget"),
        (["doc.txt", "--method", "knorms"], "knorm"),
        (["doc.txt", "--protocol", "question-aware"], "give -q"),
        (["doc.txt", "-o", "no/kept.html"], "there is no folder"),
        (["doc.txt", "--method", "knorm", "--evidence", "a dog"], "does not stand"),
        (["@nobody"], "nobody"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_line(run, tmp_path, arguments, message):
    code, out, err = run("view", *arguments, "--library", tmp_path / "library")
    assert code == 2 and out == "" and message in err and err.count("\n") == 1
    assert not (tmp_path / "kept.html").exists()
