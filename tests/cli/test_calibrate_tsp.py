"""`kvtrim calibrate tsp`: the table, the plot beside it, and what it says of mistakes."""

import json
import re
import sys

import pytest

CALIBRATE = ("calibrate", "tsp", "--prompts", "2", "--length", "440")
PNG = b"\x89PNG"


@pytest.fixture
def run(invoke, model_folder):
    return lambda *arguments: invoke(*arguments, "--model", model_folder)


def test_the_table_the_plot_and_what_to_do_with_them(run, tmp_path):
    pytest.importorskip("matplotlib")
    code, out, err = run(*CALIBRATE, "--tokens", "0.3", "--seed", "4")
    assert (code, err) == (0, "")
    found = json.loads((tmp_path / "tsp.json").read_text())
    assert found["layer"] in (0, 1) and found["layers"] == 3 and found["tokens"] == 0.3
    assert [point["layer"] for point in found["curve"]] == [0, 1]
    record = found["record"]
    assert (record["prompts"], record["seed"], record["texts"]) == (2, 4, "generated")
    assert record["machine"]["packages"]["torch"] and len(record["lengths"]) == 2
    assert (tmp_path / "tsp.png").read_bytes().startswith(PNG)
    assert f"--method fastkv --set layer={found['layer']}" in out
    assert "tsp.json, tsp.png" in out and "distance" in out


def test_a_layer_found_is_one_that_fastkv_takes(run, tmp_path):
    (tmp_path / "doc.txt").write_text("The cat sat on the mat and looked at the wide sea. " * 5)
    code, out, _ = run(*CALIBRATE, "--out", "own.json", "--tolerance", "9", "--json")
    found = json.loads(out)
    assert (code, found["layer"], found["limit"]) == (0, 0, 9.0)
    assert found["file"] == "own.json" and "tolerance" in found["rule"]
    ask = ("ask", "doc.txt", "-q", "?", "--method", "fastkv", "--keep", "64", "--json")
    code, out, _ = run(*ask, "--set", "layer=0", "--max-new-tokens", "2")
    assert code == 0


def test_prompts_of_your_own(run, tmp_path):
    (tmp_path / "prompts.txt").write_text(
        "Why?\\nSay it again. " + "So. " * 20 + "\n\nHow? Now.\n"
    )
    code, out, _ = run(*CALIBRATE, "--prompts-file", "prompts.txt", "--json")
    record = json.loads(out)["record"]
    assert code == 0 and record["texts"].startswith("sha256 ") and len(record["lengths"]) == 2


def test_without_matplotlib_the_table_is_written_all_the_same(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    code, out, err = run(*CALIBRATE, "--json")
    assert code == 0 and json.loads(out)["plot"] is None
    assert "pip install 'kvtrim[plot]'" in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["tsp.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens", "none"), "tokens='none': expected int .1 or more. or float"),
        (
            ("--tokens", "1.5"),
            "tokens=1.5: expected int .1 or more. or float .above 0, at most 1.",
        ),
        (("--tokens", "2048"), "all 4.. tokens of prompt 1 go on"),
        (("--length", "600"), "the window 512"),
        (("--out", "nowhere/x.json"), "there is no folder nowhere"),
        (("--out", "x.png"), "write to a .json file"),
        (("--prompts-file", "none.txt"), "no such document: none.txt"),
        (("--prompts", "0"), "greater than or equal to 1"),
        (("--tolerance", "-1"), "greater than or equal to 0"),
    ],
)
def test_every_mistake_is_one_line_and_leaves_nothing(run, tmp_path, arguments, message):
    code, out, err = run(*CALIBRATE, *arguments)
    assert code in (1, 2) and out == ""
    assert re.search(message, err), err
    assert err.startswith("kvtrim: ") and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())
