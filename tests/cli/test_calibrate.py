"""`kvtrim calibrate heads`, and headkv on the command line."""

import json

import pytest

from kvtrim.bench.calibrate import heads

CALIBRATE = ("calibrate", "heads", "--out", "table.json", "--length", "440", "--prompts", "2")


@pytest.fixture
def every_answer_counts(monkeypatch):
    monkeypatch.setattr(heads, "RIGHT", -1.0)  # a random model answers nothing right


def test_a_measured_table_is_one_that_headkv_reads(run, tmp_path, every_answer_counts):
    code, out, _ = run(*CALIBRATE)
    assert code == 0
    assert "3 layers of 6 query heads, 2 of 2 prompts counted" in " ".join(out.split())
    assert "--method headkv --set table=table.json" in out
    table = json.loads((tmp_path / "table.json").read_text())
    assert (tmp_path / "table.json").read_text().count("\n") == 1
    assert list(table) == [f"{layer}-{head}" for layer in range(3) for head in range(6)]
    assert all(len(scores) == 2 for scores in table.values())
    ask = ("ask", "doc.txt", "-q", "?", "--method", "headkv", "--keep", "64", "--json")
    code, out, _ = run(*ask, "--set", "table=table.json", "--max-new-tokens", "2")
    assert code == 0
    kept = json.loads(out)["kept"]
    assert len({count for layer in kept for count in layer}) > 1
    assert sum(map(sum, kept)) / 6 == pytest.approx(64 + 1, abs=2)


def test_of_kvzips_scores_it_names_the_method_that_reads_them(run):
    code, out, _ = run(*CALIBRATE, "--score", "kvzip")
    assert code == 0 and "--method kvzip-head --set table=table.json" in out


def test_the_record_says_what_was_measured(run, tmp_path, every_answer_counts, model_folder):
    code, out, _ = run(*CALIBRATE, "--seed", "3", "--puzzle", "contrast", "--json")
    printed = json.loads(out)
    record = json.loads((tmp_path / "table.record.json").read_text())
    assert code == 0
    assert printed["record"] == "table.record.json" and printed["identity"] == record["identity"]
    assert (record["score"], record["puzzle"], record["seed"]) == ("reason", "contrast", 3)
    assert (record["prompts"], record["counted"], record["lengths"]) == (2, 2, [440])
    assert record["model"] == str(model_folder) and record["haystack"] == "generated"
    assert record["machine"]["packages"]["torch"] and len(record["samples"]) == 2
    assert record["fingerprint"]["heads"] == 6


def test_the_same_seed_gives_the_same_table(run, tmp_path, every_answer_counts):
    tables = []
    for seed in ("1", "1", "2"):
        assert run(*CALIBRATE, "--seed", seed)[0] == 0
        tables.append((tmp_path / "table.json").read_text())
    assert tables[0] == tables[1] != tables[2]


def test_a_haystack_of_your_own(run, tmp_path, every_answer_counts):
    (tmp_path / "hay.txt").write_text("It rained all day. The sea was calm! Nobody came. " * 20)
    code, out, _ = run(*CALIBRATE, "--haystack", "hay.txt", "--json")
    assert code == 0 and json.loads(out)["haystack"].startswith("sha256 ")


def test_nothing_is_written_when_no_answer_was_right(run, tmp_path):
    (tmp_path / "table.json").write_text("before")
    code, _, err = run(*CALIBRATE)
    assert code == 1 and "0 of 2 prompts were answered right" in err and err.count("\n") == 1
    assert (tmp_path / "table.json").read_text() == "before"
    assert not (tmp_path / "table.record.json").exists()


ASK = ("ask", "doc.txt", "-q", "?", "--keep", "64", "--method", "headkv")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (ASK, "(3 layers of 6 query heads); those that come"),
        ((*ASK, "--set", "table=none.json"), "no head table 'none.json'"),
        ((*ASK, "--set", "table=broken.json"), "broken.json is no head table: not JSON"),
        ((*ASK, "--set", "table=small.json"), "has 1 layers of 2 query heads"),
        (
            ("compare", "doc.txt", "-q", "?", "--keep", "64", "--method", "headkv"),
            "measured on other weights",
        ),
        (("calibrate", "heads"), "Missing option '--out'"),
        ((*CALIBRATE[:3], "nowhere/x.json"), "there is no folder nowhere"),
        ((*CALIBRATE, "--score", "luck"), "--score luck: use reason or copy"),
        ((*CALIBRATE, "--puzzle", "hard"), "--puzzle hard: use two-step or one-step or contrast"),
        ((*CALIBRATE, "--haystack", "none.txt"), "no such document: none.txt"),
        ((*CALIBRATE, "--length", "4000"), "exceed the window, 512"),
        ((*CALIBRATE, "--prompts", "0"), "greater than or equal to 1"),
    ],
)
def test_every_mistake_is_one_line(run, tmp_path, arguments, message):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "small.json").write_text('{"0-0": [1], "0-1": [2]}')
    code, out, err = run(*arguments)
    assert code in (1, 2) and out == ""
    assert message in err
    assert err.startswith("kvtrim: ") and err.count("\n") == 1, err
