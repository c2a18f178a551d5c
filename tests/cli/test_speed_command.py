"""`kvtrim speed` as a user types it."""

import json
import sys
from functools import cache, partial

import pytest

from kvtrim.bench.speed import peer_kvpress, roofline
from kvtrim.hf.models import random

SHORT = ("--repeats", "2", "--new-tokens", "3")
RANDOM = ("--config", "smollm2-135m", "--layers", "2", "--width", "1")


@pytest.fixture(scope="module", autouse=True)
def once():
    """What the machine can do, and the models made by chance: measured and made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "of_machine", cache(roofline.of_machine))
        patch.setattr(random, "build", cache(random.build))
        yield


@pytest.fixture
def speed(invoke):
    return partial(invoke, "speed")


def test_plain_transformers_is_measured_in_the_same_run(speed, model_folder):
    code, out, _ = speed(
        "--model", model_folder, "--length", 48, "--context", 80, "--method", "snapkv",
        "--method", "full", "--keep", 40, *SHORT, "--json",
    )  # fmt: skip
    record = json.loads(out.strip().splitlines()[-1])
    assert code == 0 and out.count("\n") == 1, "one thing: the record"
    assert [(r["length"], r["method"]) for r in record["rows"]] == [
        (48, "transformers"), (48, "snapkv"), (48, "full"),
        (80, "transformers"), (80, "snapkv"), (80, "full"),
    ]  # fmt: skip
    assert record["machine"]["packages"]["torch"] and record["machine"]["threads"]
    assert record["limits"]["copy_bytes_per_s"] > 0 < record["limits"]["matmul_flop_per_s"]
    assert all(r["ttft_ratio"] == 1 for r in record["rows"] if r["method"] == "transformers")
    assert record["rows"][4]["held_bytes"] < record["rows"][3]["held_bytes"]


def test_a_folder_holds_everything_and_asking_again_measures_nothing(speed, tmp_path):
    pytest.importorskip("matplotlib")
    asked = ("--length", 48, "--method", "snapkv", "--keep", "40", *SHORT, *RANDOM, "--json")
    code, out, _ = speed(*asked, "--out", "run")
    folder = tmp_path / "run"
    assert code == 0 and out.count("\n") == 1
    names = ["memory.png", "run.json", "speed.json", "speed.jsonl", "speed.md"]
    assert sorted(p.name for p in folder.iterdir()) == [*names, "token.png", "ttft.png"]
    record = json.loads((folder / "speed.json").read_text())
    assert record == json.loads(out) and len(record["rows"]) == 2
    assert record["model"]["config"] == "smollm2-135m" and record["model"]["layers"] == 2
    lines = (folder / "speed.jsonl").read_text()
    assert speed(*asked, "--out", "run")[1] == out
    assert (folder / "speed.jsonl").read_text() == lines
    code, _, err = speed(*asked, "--new-tokens", "4", "--out", "run")
    assert code == 2 and "plan.new_tokens: 3 there, 4 here" in err and err.count("\n") == 1
    page = (folder / "speed.md").read_text()
    assert "random weights, 2 layers, width 1" in page and "2502.01068" in page


def test_without_matplotlib_the_rest_is_written(speed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    asked = ("--length", 48, "--method", "full", *SHORT, *RANDOM)
    code, _, err = speed(*asked, "--out", "run", "--json")
    assert code == 0 and "kvtrim[plot]" in err.replace("\n", "")
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["run.json", "speed.json", "speed.jsonl", "speed.md"]


def test_rows_that_cannot_be_measured_are_shown_with_their_reason(speed):
    methods = ("--method", "pyramidinfer", "--method", "snapkv", "--keep", "34", "--batch", 2)
    code, out, _ = speed("--length", 80, *methods, *SHORT, *RANDOM, "--layers", 3, "--json")
    record = json.loads(out.strip().splitlines()[-1])
    assert code == 0 and "out of reach" in " ".join(out.split())
    assert [row["outcome"] for row in record["rows"]] == ["ok", "refused", "ok"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "nothing"), "unknown method"),
        (("--out", "nowhere/x"), "there is no folder"),
        (("--config", "lama-3.1-8b"), "did you mean 'llama-3.1-8b'"),
        (("--config", "qwen3-8b", "--model", "smollm2"), "not both"),
        (("--layers", "2"), "need --config"),
        ((*RANDOM[:2], "--layers", "31"), "smollm2-135m has 30"),
        ((*RANDOM[:2], "--width", "half"), "give KV heads (2) or a share"),
        ((*RANDOM, "--length", "8193"), "exceed the window, 8192"),
        ((*RANDOM, "--set", "windw=3"), "did you mean 'window'"),
        (("--peer", "vllm"), "--peer vllm: use kvpress"),
        (("--peer", "kvpress"), "pip install kvpress"),
    ],
)
def test_every_bad_input_is_one_line_and_an_exit_code(speed, monkeypatch, arguments, message):
    monkeypatch.setattr(peer_kvpress, "find_spec", lambda name: None)
    code, out, err = speed(*arguments)
    assert code == 2 and message in err
    assert err.startswith("kvtrim: ") and err.count("\n") == 1 and out == ""


def test_the_help_names_every_configuration(speed):
    code, out, _ = speed("--help")
    assert code == 0 and all(name in out for name in random.CONFIGS)


def test_a_prompt_longer_than_a_loaded_models_window_is_refused(speed, model_folder):
    code, _, err = speed("--model", model_folder, "--length", 600)
    assert code == 2 and "exceed the window, 512" in err


def test_a_method_of_ones_own_that_was_edited_is_another_run(speed, tmp_path, monkeypatch):
    source = "import kvtrim\nMINE = kvtrim.METHODS['knorm']\n"
    (tmp_path / "speedy.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    asked = ("--length", 48, "--method", "speedy:MINE", "--keep", "40", *RANDOM, "--json")
    asked += ("--repeats", 1, "--new-tokens", 2)
    code, out, _ = speed(*asked, "--out", "run")
    first = json.loads(out)
    assert code == 0 and list(first["outside"]) == ["speedy:MINE"]
    assert speed(*asked, "--out", "run")[:2] == (0, out)
    (tmp_path / "speedy.py").write_text(source + "# another version\n")
    monkeypatch.delitem(sys.modules, "speedy")
    code, out, err = speed(*asked, "--out", "run")
    assert code == 2 and "outside.speedy:MINE" in err and "holds another run" in err
    code, out, _ = speed(*asked)
    assert json.loads(out)["outside"] != first["outside"]
