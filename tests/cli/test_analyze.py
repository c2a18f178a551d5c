"""`kvtrim analyze`: what it lists, writes and refuses."""

import json
import os
import sys

import pytest

from kvtrim.bench.analyses.base import OfFolders
from kvtrim.bench.analyses.registry import ANALYSES
from report.synthetic import evaluation

PROMPTS = [name for name, one in ANALYSES.items() if not isinstance(one, OfFolders)]
FILES = [name for name in PROMPTS if not ANALYSES[name].scores]
EXTRA = {"cosine": ("--method", "snapkv", "--keep", "50"), "retained": ("--method", "adakv")}
EXTRA["reconstruction"] = ("--keep", "50%")
EXTRA["tsne"] = ("--rate", "0.4")


@pytest.fixture
def text(tmp_path):
    (tmp_path / "long.txt").write_text("The cat sat on the mat and looked at the sea. " * 5)
    return "long.txt"


def test_all_of_them_are_listed_with_their_papers(invoke):
    code, out, _ = invoke("analyze", "--json")
    listed = json.loads(out)["analyses"]
    assert code == 0 and [one["name"] for one in listed] == [*ANALYSES]
    assert all(one["its figure"] and one["paper"] for one in listed)
    code, out, _ = invoke("analyze")
    assert code == 0 and all(name in out for name in ANALYSES)


@pytest.mark.parametrize("name", FILES)
def test_a_table_and_a_picture_of_a_text(run, tmp_path, text, name):
    pytest.importorskip("matplotlib")
    if ANALYSES[name].needs:
        pytest.importorskip("sklearn")
    extra = EXTRA.get(name, ())
    own = ("analyze", name, text, *extra)
    code, out, err = run(*own, *(("--window", "16") if "window" in ANALYSES[name].uses else ()))
    assert (code, err) == (0, "")
    found = json.loads((tmp_path / "analysis" / f"{name}.json").read_text())
    assert found["analysis"] == name and found["rows"] and found["panels"]
    record = found["record"]
    assert record["protocol"] == "question-agnostic" and record["machine"]["packages"]["torch"]
    assert record["prompts"][0]["name"] == text and record["prompts"][0]["sha256"]
    page = (tmp_path / "analysis" / f"{name}.md").read_text()
    assert page.startswith(f"# {found['title']}\n") and "question-agnostic" in page
    assert (tmp_path / "analysis" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert f"{name}.png" in out.replace("\n", "")


def test_prompts_of_a_benchmark_are_read_with_their_question(run, tmp_path):
    pytest.importorskip("matplotlib")
    how = ("-t", "bench.questions:LONG", "--length", "400", "--limit", "2", "--seed", "3", "--svg")
    code, out, err = run("analyze", "heatmap", *how, "--json", "-o", "maps")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["record"]["protocol"] == "question-aware" and found["record"]["seed"] == 3
    assert [row["task"] for row in found["rows"]] == ["long"]
    assert [one["truncated"] for one in found["record"]["prompts"]] == [True] * 2
    assert (tmp_path / "maps" / "heatmap.svg").read_bytes().startswith(b"<?xml")


def test_folders_of_evaluations(invoke, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    evaluation(tmp_path / "run", ("a", "b", "c"), ("snapkv", "h2o", "knorm"), ("64",))
    for name in ("friedman", "sensitivity", "frontier"):
        code, out, err = invoke("analyze", name, "run", "--json")
        assert (code, err) == (0, "") and json.loads(out)["rows"]
        assert (tmp_path / "analysis" / f"{name}.png").exists()


REFUSED = [
    (("overlpa", "long.txt"), "unknown analysis 'overlpa'; did you mean 'overlap'?"),
    (("mass",), "there is no prompt; name text files, or benchmarks with --task"),
    (("mass", "long.txt", "-t", "niah"), "both a file and --task are given"),
    (("mass", "none.txt"), "no such document: none.txt"),
    (("mass", "short.txt"), "this analysis needs at least 64: give a longer text or --length"),
    (("mass", "long.txt", "--window", "200"), "needs at least 400"),
    (("mass", "long.txt", "--rate", "0.1"), "--rate changes nothing in mass; leave it out"),
    (("loss", "long.txt", "--method", "snapkv"), "--method changes nothing in loss"),
    (("overlap", "long.txt", "--rate", "0.1", "--rate", "0.2"), "--rate is given several times"),
    (("leverage", "long.txt", "--layer", "9"), "--layer 9: the layers are 0 to 2"),
    (("mass", "long.txt", "--length", "9000"), "--length 9000 is more than the window"),
    (("mass", "long.txt", "-o", "no/such/place"), "there is no folder no/such"),
    (("mass", "long.txt", "-o", "long.txt"), "long.txt is a file; name a folder with --out"),
    (("retained", "long.txt", "--method", "fastkv"), "needs one of its own"),
    (("propagation", "long.txt"), "needs right answers: take the prompts of a benchmark"),
    (("mass", "-t", "ruler-vt", "-q", "Why?"), "--question goes with a text file"),
]


@pytest.mark.parametrize(("arguments", "said"), REFUSED, ids=lambda x: x[0] if len(x) < 9 else "")
def test_one_line_says_what_to_do(run, tmp_path, text, arguments, said):
    (tmp_path / "short.txt").write_text("Too short.")
    code, _, err = run("analyze", *arguments)
    assert code == 2 and said in err and err.count("\n") == 1
    assert not (tmp_path / "analysis").exists()


@pytest.mark.parametrize(("out", "closed"), [("there", "there"), ("new", ".")])
def test_a_closed_folder_is_refused_before_any_work(run, tmp_path, text, monkeypatch, out, closed):
    (tmp_path / "there").mkdir()
    may = os.access

    def access(path, mode):
        return may(path, mode) and not (mode & os.W_OK and str(path) == closed)

    monkeypatch.setattr(os, "access", access)
    code, _, err = run("analyze", "mass", text, "-o", out)
    assert code == 2 and f"cannot write into {out}; name another folder with --out" in err


def test_a_place_that_is_taken_is_one_line_that_names_it(invoke, tmp_path):
    pytest.importorskip("scipy")
    evaluation(tmp_path / "run", ("a", "b", "c"), ("snapkv", "h2o", "knorm"), ("64",))
    (tmp_path / "analysis" / "friedman.md").mkdir(parents=True)
    code, _, err = invoke("analyze", "friedman", "run")
    assert code == 1 and err == "kvtrim: cannot write analysis/friedman.md: it is a folder\n"


def test_a_folder_without_what_is_needed(invoke, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err = invoke("analyze", "friedman", "empty")
    assert code == 2 and "holds no results: name the --out folder" in err
    code, _, err = invoke("analyze", "friedman")
    assert code == 2 and "reads folders that kvtrim eval wrote" in err
    code, _, err = invoke("analyze", "friedman", "empty", "--model", "x")
    assert code == 2 and "--model is for prompts, and friedman reads folders" in err


@pytest.mark.parametrize(
    ("name", "package", "called"),
    [("tsne", "sklearn", "scikit-learn"), ("friedman", "scipy", "scipy")],
)
def test_a_missing_package_is_named_before_any_work(
    invoke, text, name, package, called, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = invoke("analyze", name, text)
    assert code == 2 and f'{name} needs {called}: pip install "kvtrim[analysis]"' in err


def test_without_matplotlib_the_table_is_written_all_the_same(run, tmp_path, text, monkeypatch):
    for module in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, module, None)
    code, out, err = run("analyze", "overlap", text, "--json")
    assert code == 0 and json.loads(out)["files"]["picture"] == ""
    assert "plots need matplotlib" in err and err.count("\n") == 1
    assert sorted(p.name for p in (tmp_path / "analysis").iterdir()) == [
        "overlap.json",
        "overlap.md",
    ]
