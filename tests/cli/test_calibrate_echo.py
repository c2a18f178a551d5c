"""`kvtrim calibrate echo`, and echo on the command line."""

import json

import pytest

WORDS = "The boat came late and the bell rang while nobody looked at the tide. "


@pytest.fixture
def run(invoke, tmp_path, model_folder):
    """Run a command on a tiny model, beside three texts."""
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.txt").write_text(f"{name} " + WORDS * 3)
    return lambda *arguments: invoke(*arguments, "--model", model_folder)


CALIBRATE = ("calibrate", "echo", "--out", "own.safetensors", "--length", "100")
TEXTS = tuple(x for name in ("one", "two", "three") for x in ("--texts", f"{name}.txt"))


def test_a_fitted_table_is_one_that_echo_reads(run, tmp_path):
    code, out, _ = run(*CALIBRATE, *TEXTS, "--tokens", "300")
    assert code == 0 and "--method echo --set table=own.safetensors" in out
    assert "264 tokens of 3 texts" in " ".join(out.split())
    assert (tmp_path / "own.png").exists()
    record = json.loads((tmp_path / "own.record.json").read_text())
    assert [text["name"] for text in record["texts"]] == ["one.txt", "two.txt", "three.txt"]
    ask = ("ask", "one.txt", "-q", "?", "--method", "echo", "--keep", "40", "--json")
    code, out, _ = run(*ask, "--set", "table=own.safetensors", "--max-new-tokens", "2")
    assert code == 0
    kept = json.loads(out)["kept"]
    assert sum(map(sum, kept)) / 6 == pytest.approx(40 + 1, abs=2)
    assert len({count for layer in kept for count in layer}) > 1


def test_a_model_without_a_table_is_told_the_command(run):
    code, _, err = run("ask", "one.txt", "-q", "?", "--method", "echo", "--keep", "40")
    assert code != 0 and "kvtrim calibrate echo --model MODEL" in " ".join(err.split())


def test_another_ending_is_refused_before_anything_is_loaded(run):
    code, _, err = run("calibrate", "echo", "--out", "own.json", *TEXTS)
    assert code != 0 and "safetensors" in err
