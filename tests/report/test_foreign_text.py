"""Names and reasons of anybody's are text on every page and in every table."""

import json
import re

import pytest
from synthetic import evaluation

from kvtrim.report import check, html, results
from kvtrim.report import markdown as page
from kvtrim.report.document import chapters
from kvtrim.report.format import Cells, escape, visible

ACTING = "\x1b[2J\x1b]0;pwned\x07\r\x9b31m\u202e\u2028\ud800\x00\x7f"
EVIL = f"<script>x</script> a|b [l](javascript:x) `c` *d* <!-- /kvtrim:table --> {ACTING}\n# head"


@pytest.mark.parametrize("letter", [one for one in ACTING if not one.isprintable()])
def test_what_would_act_on_a_terminal_is_shown(letter):
    shown = visible(f"a{letter}b")
    assert letter not in shown and shown.startswith("a\\") and shown.endswith("b")
    assert shown.isprintable()


ORDINARY = ["plain", "a\nb\tc", "é ß 中 😀", "👩\u200d🚀", "a\u200cb", r"\x1b"]
ORDINARY_CELLS = ["niah_single_1", "25%", "41.2 (35.0 to 47.1)", "-12.3%", "-", "a-b/c: 3, d=4"]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_stays_as_it_is(text):
    assert visible(text) == text


@pytest.mark.parametrize(
    "text",
    ["niah_single_1", "25%", "41.2 (35.0 to 47.1)", "-12.3%", "x0.51", "-", "a-b/c: 3, d=4"],
)
def test_ordinary_cells_stay_as_they_are(text):
    assert escape(text) == text


def test_cells_hold_no_tags_links_or_breaks():
    row = Cells.texts("ab", [[EVIL, "x"]]).markdown().split("\n")
    assert len(row) == 4  # heading, rule, the row, and nothing behind it
    assert len(re.findall(r"(?<!\\)\|", row[2])) == 3
    assert "<" not in row[2] and not re.search(r"(?<!\\)[\[`*]", row[2])


@pytest.fixture
def made(tmp_path):
    """A report in which everything that may be foreign is."""
    folder = evaluation(tmp_path / "run", ["longbench-qasper", "own"], ["snapkv"], ["128"])
    record = json.loads((folder / "run.json").read_text())
    record["model"]["name"] = f"/models/{EVIL}"
    record["tasks"] = {EVIL if name == "own" else name: v for name, v in record["tasks"].items()}
    (folder / "run.json").write_text(json.dumps(record).replace("\\ud800", ""))
    for name in ("inputs", "samples", "scores"):
        path = folder / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row["task"] = EVIL if row["task"] == "own" else row["task"]
            if name == "samples" and row["method"] == "snapkv":
                row |= {"outcome": "refused", "reason": EVIL}
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text.replace("\\ud800", ""))
    return chapters(*results.read_results([folder]))


def test_pages_hold_foreign_text_as_text(made):
    text = page.markdown(
        made, {picture["name"]: "plots/x.png" for c in made for picture in c.pictures}
    )
    web = html.page(made, {})
    for each in (text, web):
        assert "<script>x" not in each and "pwned" in each
        assert all(letter.isprintable() or letter == "\n" for letter in each)
    assert "[l](javascript" not in text


def test_marked_tables_are_found_again_whatever_they_are_called(made, tmp_path):
    path = tmp_path / "report.md"
    path.write_text(page.markdown(made, {}))
    tables = check.all_tables(made)
    assert check.document(path, tables) == []
    assert check.fill(path, tables).count("<!-- kvtrim:table ") == len(tables)
