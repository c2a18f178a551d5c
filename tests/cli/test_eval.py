"""`kvtrim eval` and `kvtrim sweep` as a user types them."""

import json

import pytest

TINY = (
    "--method",
    "snapkv",
    "--keep",
    "48",
    "--set",
    "window=8",
    "--limit",
    "2",
    "--threads",
    "1",
)
WORDS = ("--task", "bench.questions:WORDS_TASK")
AWARE = ("--protocol", "question-aware")


@pytest.fixture
def kvtrim(monkeypatch, invoke):
    """Run a command without data of the user's own."""
    monkeypatch.delenv("KVTRIM_DATA", raising=False)
    return invoke


def test_a_folder_and_a_table(kvtrim, model_folder, tmp_path):
    asked = ("eval", "--model", model_folder, *WORDS, *TINY, *AWARE, "--out", "run")
    code, out, _ = kvtrim(*asked)
    assert code == 0 and "snapkv" in out and "question-aware" in out
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == [
        "eval.json", "eval.md", "inputs.jsonl", "run.json", "samples.jsonl", "scores.jsonl",
        "times.jsonl",
    ]  # fmt: skip
    made = json.loads((tmp_path / "run" / "eval.json").read_text())
    code, out, _ = kvtrim(*asked, "--json")
    assert code == 0 and json.loads(out) == made and out.count("\n") == 1
    assert [row["method"] for row in made["rows"][:2]] == ["full", "snapkv:window=8"]
    code, _, err = kvtrim(*asked, "--seed", 3)
    assert code == 2 and "seed: 0 there, 3 here" in err and err.count("\n") == 1


def test_several_lengths_are_several_runs(kvtrim, model_folder, tmp_path):
    lengths = ("--length", 64, "--length", 96, "--no-chat", "--out", "run", "--json")
    code, out, _ = kvtrim("eval", "--model", model_folder, *WORDS, *TINY, *AWARE, *lengths)
    found = json.loads(out)
    assert code == 0 and sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "length-64", "length-96"
    ]  # fmt: skip
    assert [found[name]["length"] for name in ("64", "96")] == [64, 96]
    assert found["64"]["chat"] is False and found["64"]["tasks"]["words"]["chat"] is False


def test_without_a_folder_nothing_is_left(kvtrim, model_folder, tmp_path):
    code, out, _ = kvtrim("eval", "--model", model_folder, *WORDS, *TINY, *AWARE, "--json")
    assert code == 0 and json.loads(out)["rows"] and not list(tmp_path.iterdir())


def test_what_was_refused_is_said(kvtrim, model_folder):
    code, out, _ = kvtrim(
        "eval", "--model", model_folder, *WORDS, *TINY, *AWARE, "--method", "pyramidinfer"
    )
    assert code == 0 and "2 refused" in out and "out of reach" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (WORDS, "--protocol is missing: use question-aware or question-agnostic"),
        ((*WORDS, "--protocol", "aware"), "--protocol aware is unknown"),
        (AWARE, "no task; name one with --task"),
        ((*AWARE, "--task", "rulr"), "did you mean 'ruler'"),
        ((*AWARE, "--task", "nowhere:TASK"), "cannot load task 'nowhere:TASK'"),
        ((*AWARE, "--task", "bench.questions:WORDS"), "not a kvtrim Task"),
        ((*AWARE, *WORDS, "--method", "snapvk"), "did you mean 'snapkv'"),
        ((*AWARE, *WORDS, "--keep", "150%"), "more than the whole prompt"),
        ((*AWARE, *WORDS, "--set", "windw=3"), "did you mean 'window'"),
        ((*AWARE, *WORDS, "--prefill", "twice"), "use once or each"),
        ((*AWARE, *WORDS, "--out", "nowhere/x"), "there is no folder"),
        ((*AWARE, *WORDS, "--data", "nowhere"), "no such folder of data: nowhere"),
    ],
)
def test_every_bad_input_is_one_line_and_an_exit_code(kvtrim, arguments, message):
    code, out, err = kvtrim("eval", *arguments)
    assert code == 2 and message in err
    assert err.startswith("kvtrim: ") and err.count("\n") == 1 and out == ""


def test_missing_data_is_said_before_the_model_is_looked_for(kvtrim, tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "essays.txt").write_text("An essay. Another sentence.")
    asked = ("eval", "--task", "ruler", *AWARE, "--data", "rows", "--model", "no-such-model")
    code, out, err = kvtrim(*asked)
    assert code == 2 and "squad is not in rows: put squad.jsonl" in err and out == ""
    assert "measure the group ruler-offline" in err and err.count("\n") == 1


def test_the_seed_draws_no_rows(kvtrim):
    _, out, _ = kvtrim("eval", "--help")
    assert "samples drawn" not in " ".join(out.split()) and "the first of them" in out


def test_a_wrong_sweep_is_one_line_and_an_exit_code(kvtrim, tmp_path):
    code, _, err = kvtrim("sweep", "none.toml", "--out", "out")
    assert code == 2 and "cannot read none.toml" in err and err.count("\n") == 1
    (tmp_path / "sweep.toml").write_text('taks = ["ruler"]')
    code, _, err = kvtrim("sweep", "sweep.toml", "--out", "out")
    assert code == 2 and "did you mean 'tasks'" in err and err.count("\n") == 1
