"""`kvtrim report` as a user types it: pages, plots, `--check` and `--fill`."""

import json
import re
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser

import pytest

from kvtrim.cli import report
from kvtrim.report import results
from kvtrim.report.document import chapters
from report.synthetic import evaluation, grid, largest, longbench, ruler, speed

PNG = b"\x89PNG"
TASKS = [longbench("qasper"), ruler("vt"), ("niah", grid((2048,), (0, 50), 1)), "gsm8k-0"]


@pytest.fixture
def drawing():
    """Tests that ask for this draw the plots, which takes its time."""
    pytest.importorskip("matplotlib")


@pytest.fixture
def run(request, monkeypatch, invoke, tmp_path):
    """Report on a folder with results in `results`."""
    evaluation(tmp_path / "results", TASKS, ["snapkv", "h2o"], ["128"], limit=3)
    if "drawing" not in request.fixturenames:
        monkeypatch.setattr("kvtrim.cli.report._draw", lambda *_: {})
    return partial(invoke, "report")


class Page(HTMLParser):
    """Tags, links and texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_pages_hold_every_table_and_need_no_other_file(run, drawing, tmp_path):
    code, out, err = run("results")
    assert (code, err) == (0, "") and "Overview" in out and "report.html" in out
    text = (tmp_path / "results" / "report.html").read_text()
    page = Page(text)
    assert not page.open and page.tags.count("table") >= 8
    assert page.tags.count("script") == 1 and "fetch" not in text and "http" not in text
    sources = [value for name, value in page.attributes if name == "src"]
    assert sources and all(value.startswith("data:image/png;base64,") for value in sources)
    links = [value for name, value in page.attributes if name == "href"]
    names = [value for name, value in page.attributes if name == "id"]
    assert links and all(link[0] == "#" and link[1:] in names for link in links)
    assert len(names) == len(set(names)) and "prefers-color-scheme: dark" in text
    markdown = (tmp_path / "results" / "report.md").read_text()
    for path in re.findall(r"!\[.*?\]\((.*?)\)", markdown):
        assert (tmp_path / "results" / path).read_bytes().startswith(PNG)
    assert markdown.count("<!-- kvtrim:table ") == markdown.count("<!-- /kvtrim:table -->") >= 8


def test_the_same_data_give_the_same_pages(run, tmp_path):
    run("results", "--out", "one")
    run("results", "--out", "two")
    assert (tmp_path / "one/report.md").read_bytes() == (tmp_path / "two/report.md").read_bytes()


def test_machines_get_the_tables_as_json(run):
    code, out, _ = run("results", "--json")
    found = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    names = [table["name"].rpartition("/")[2] for table in found["tables"]]
    assert {"overview", "longbench", "ruler", "niah", "gsm8k", "change", "fidelity"} <= {*names}
    assert all(len(row) == len(t["columns"]) for t in found["tables"] for row in t["rows"])


def test_a_report_without_matplotlib_says_what_is_missing(run, drawing, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    code, _, err = run("results")
    assert code == 0 and "kvtrim[plot]" in err
    assert "img" not in Page((tmp_path / "results/report.html").read_text()).tags


DOCUMENT = """# What it shows

<!-- kvtrim:table question-agnostic/ruler method=full,snapkv keep=all,128 -->
<!-- /kvtrim:table -->

Words after it.
"""


def test_check_passes_on_what_report_wrote_and_names_the_line_that_differs(run, tmp_path):
    run("results")
    code, out, err = run("results", "--check")
    assert (code, err) == (0, "") and "as the data say" in out
    path = tmp_path / "results" / "report.md"
    lines = path.read_text().split("\n")
    place = next(n for n, line in enumerate(lines) if line.startswith("| snapkv | 128"))
    lines[place] = lines[place].replace("128", "129", 1)
    path.write_text("\n".join(lines))
    code, _, err = run("results", "--check")
    assert code == 1 and f"results/report.md:{place + 1}: the file says" in err


def test_check_fails_when_the_data_changed(run, tmp_path):
    run("results")
    path = tmp_path / "results" / "scores.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[5]["score"] = 1 - rows[5]["score"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = run("results", "--check")
    assert code == 1 and "report.md:" in err and "report.html:1: it was made of other data" in err


def test_check_compares_what_eval_itself_averaged(run, tmp_path):
    run("results")
    made = {"task": TASKS[0], "method": "h2o", "keep": "128", "group": {}, "n": 3, "score": 0.5}
    path = tmp_path / "results" / "eval.json"
    other = made | {"group": {"length": 5}}
    path.write_text(json.dumps({"rows": [other, made]}, indent=1))
    code, _, err = run("results", "--check")
    *_, line = (n for n, x in enumerate(path.read_text().split("\n"), 1) if '"score"' in x)
    assert code == 1 and f"results/eval.json:{line}: h2o 128 on {TASKS[0]}: score 0.5 there" in err


def test_documents_are_filled_and_checked(run, tmp_path):
    document = tmp_path / "page.md"
    document.write_text(DOCUMENT)
    code, _, err = run("results", "--check", "page.md")
    assert code == 1 and "page.md:4:" in err
    assert run("results", "--fill", "page.md")[0] == 0
    text = document.read_text()
    assert text.count("\n| ") == 4 and "Words after it." in text and "| h2o" not in text
    assert run("results", "--check", "page.md")[0] == 0
    assert run("results", "--fill", "page.md")[0] == 0 and document.read_text() == text
    loose = text.replace("| full |", "|  full  |").replace("| --- |", "| :-- |")
    document.write_text(loose)  # how a formatter may leave it
    assert run("--check", "results", "page.md")[0] == 0
    document.write_text(re.sub(r"(\| snapkv \| 128 \| )[\d.]+%", r"\g<1>99.9%", text))
    code, _, err = run("results", "--check", "page.md")
    assert code == 1 and re.search(r"page\.md:8: the file says .*99\.9%", err)


@pytest.mark.parametrize(
    "text, said",
    [
        ("nothing here\n", "page.md:1: it has no tables"),
        ("\n<!-- kvtrim:table ruler -->\n", "page.md:2: this table is not closed"),
        ("<!-- /kvtrim:table -->\n", "page.md:1: this marker is out of place"),
        ("<!-- kvtrim:table rulr -->\n<!-- /kvtrim:table -->\n", "page.md:1: unknown table"),
        ("<!--kvtrim:table ruler-->\n", "page.md:1: this marker is out of place"),
    ],
)
def test_markers_that_cannot_be_right_are_named(run, tmp_path, text, said):
    run("results")
    (tmp_path / "page.md").write_text(text)
    code, _, err = run("results", "--check", "page.md")
    assert code == 1 and said in err


def test_a_name_that_several_tables_have_is_refused(run, tmp_path):
    evaluation(tmp_path / "aware", TASKS, ["snapkv"], ["128"], protocol="question-aware")
    document = "<!-- kvtrim:table ruler -->\n<!-- /kvtrim:table -->\n"
    (tmp_path / "page.md").write_text(document)
    code, _, err = run("results", "aware", "--out", "both", "--check", "page.md")
    assert code == 1 and "may be" in err and "question-aware" in err


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((), "name a folder"),
        (("results", "results"), "--out"),
        (("missing",), "missing holds no results"),
        (("results", "page.md"), "add --check"),
        (("results", "--check", "--fill", "page.md"), "writes nothing"),
        (("results", "--out", "no/where"), "there is no folder"),
        (("results", "--fill", "absent.md"), "cannot read absent.md"),
    ],
)
def test_mistakes_are_refused_with_a_remedy(run, arguments, said):
    code, _, err = run(*arguments)
    assert code == 2 and said in err


@pytest.mark.parametrize("name", ["report.md", "leaderboard.html", "picture"])
def test_a_place_that_is_taken_is_one_line_that_names_it(run, drawing, tmp_path, name):
    if name == "picture":
        name = next(iter(report._links(chapters(*results.read_results([tmp_path]))).values()))
    (tmp_path / "results" / name).mkdir(parents=True)
    code, _, err = run("results", "--leaderboard")
    assert code == 1 and err == f"kvtrim: cannot write results/{name}: it is a folder\n"


def test_check_without_a_report_says_how_to_make_one(run):
    code, _, err = run("results", "--check")
    assert code == 1 and "make it with kvtrim report" in err


def test_a_speed_run_is_a_chapter_with_tables_and_plots(run, drawing, tmp_path):
    evaluation(tmp_path / "results", TASKS[:1], ["snapkv"], ["128"])
    speed(tmp_path / "fast")
    code, out, _ = run("results", "fast", "--out", "both", "--json")
    names = [table["name"] for table in json.loads(out)["tables"]]
    assert code == 0 and any(name.endswith("/speed") for name in names)
    assert any(name.endswith("/speed-spread") for name in names)
    page = (tmp_path / "both/report.html").read_text()
    assert page.count("<h2") == 3 and page.count("Speed: ") > 1
    assert run("results", "fast", "--out", "both", "--check")[0] == 0


def test_the_largest_batches_are_a_chapter_beside_others(run, tmp_path):
    for place in ("some/a", "some/b"):
        largest(tmp_path / place)
    speed(tmp_path / "some/fast")
    code, out, err = run("some", "results", "--out", "both", "--json")
    assert (code, err) == (0, "")
    tables = {table["name"]: table for table in json.loads(out)["tables"]}
    names = [name for name in tables if "/largest-batch" in name]
    assert names == ["smollm2/largest-batch", "smollm2/largest-batch-b"]
    assert "smollm2/speed" in tables and "smollm2/speed-spread" in tables
    assert [row[1:5] for row in tables[names[0]]["rows"]] == [
        ["transformers", "all", "1", "x1.00"], ["snapkv", "256", "3", "x3.00"],
    ]  # fmt: skip
    page = (tmp_path / "both/report.html").read_text()
    assert "Largest batches: smollm2, an abacus" in page and unique(page)
    assert run("some", "results", "--out", "both", "--check")[0] == 0


def test_a_folder_of_largest_batches_alone_is_a_report(run, tmp_path):
    largest(tmp_path / "most")
    code, out, err = run("most", "--leaderboard")
    assert (code, err) == (0, "") and "largest" in out.lower()
    journal = tmp_path / "most" / "speed.jsonl"
    journal.write_text(journal.read_text()[:30])  # it was killed at its first line
    code, out, err = run("most")
    assert code == 0 and "most holds no samples yet" in err


def unique(text):
    names = [value for name, value in Page(text).attributes if name == "id"]
    return len(names) == len(set(names))


def test_two_speed_runs_of_one_model_and_device_keep_apart(run, drawing, tmp_path):
    for place, lengths in (("a/fast", (1024, 4096)), ("b/fast", (512, 2048)), ("c", (64, 128))):
        speed(tmp_path / place, lengths=lengths)
    code, out, _ = run("a", "b", "c", "--out", "both", "--json")
    names = [table["name"] for table in json.loads(out)["tables"]]
    assert code == 0 and len(names) == len(set(names))
    text = (tmp_path / "both/report.html").read_text()
    parts = text.split("<h2 ")[1:]
    assert len(parts) == 3 and unique(text) and all(part.count("<figure") == 3 for part in parts)
    pictures = re.findall('base64,([^"]+)', text)
    assert len(pictures) == len(set(pictures)) == 9
    links = re.findall(r"^- \[.*\]\((#.*)\)", (tmp_path / "both/report.md").read_text(), re.M)
    assert len(links) == len(set(links)) == 3


def test_models_whose_names_end_alike_keep_apart(run, tmp_path):
    for number, model in enumerate(("a/tiny", "b/tiny", "b/tiny.", "c/other")):
        evaluation(tmp_path / f"all/{number}", TASKS, ["snapkv"], ["10", "10%"], model=model)
    code, out, _ = run("all", "--json")
    names = [table["name"] for table in json.loads(out)["tables"]]
    assert code == 0 and len(names) == len(set(names))
    assert {name.partition("/")[0] for name in names} >= {"a-tiny", "other"}
    assert unique((tmp_path / "all/report.html").read_text())
    found = chapters(*results.read_results([tmp_path / "all"]))
    links = report._links(found)
    files = [name.lower() for name in links.values()]
    assert len(files) == len(set(files)) == sum(len(chapter.pictures) for chapter in found)
    assert run("all", "--check")[0] == 0


def test_what_did_not_come_to_its_end_is_named(run, tmp_path):
    evaluation(tmp_path / "some/done", TASKS, ["snapkv"], ["128"])
    begun = evaluation(tmp_path / "some/begun", TASKS, ["snapkv"], ["128"], model="other")
    (begun / "scores.jsonl").unlink()
    record = json.loads((begun / "run.json").read_text())
    record["tasks"]["mmlu-5"] = {}
    (begun / "run.json").write_text(json.dumps(record | {"fitting": True}))
    for name in ("nothing", "planned"):
        evaluation(tmp_path / "some" / name, TASKS, ["snapkv"], ["128"], model=name)
        (tmp_path / "some" / name / "samples.jsonl").write_text("")
    (tmp_path / "some/planned/samples.jsonl").unlink()
    code, _, err = run("some", "--json")
    said = err.replace("\n", " ")
    assert code == 0 and "some/done" not in said
    assert "some/begun has no scores of" in said and "kvtrim eval" in said
    assert "some/begun has no samples of mmlu-5 (those that would have to be cut" in said
    assert "some/nothing holds no samples yet" in said and "some/planned holds no" in said
    page = (tmp_path / "some/report.md").read_text()
    assert "begun has no scores of" in page and "begun has no samples of mmlu-5" in page


def test_a_run_without_samples_is_nothing_to_report(run, tmp_path):
    (evaluation(tmp_path / "none", [], ["snapkv"], ["128"]) / "samples.jsonl").write_text("")
    code, _, err = run("none")
    assert code == 2 and "nothing was measured in none yet" in err


def test_reading_results_needs_no_torch(tmp_path):
    evaluation(tmp_path / "run", TASKS[:1], ["snapkv"], ["128"])
    code = (
        "import sys; sys.modules['torch'] = None; from pathlib import Path; "
        "from kvtrim.report import document, results; "
        f"print(len(document.chapters(*results.read_results([Path({str(tmp_path)!r})]))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "1", done.stderr


def test_the_leaderboard_is_written_when_asked_for_and_checked(run, tmp_path):
    evaluation(tmp_path / "run", ("a", "b"), ("snapkv", "h2o"), ("64", "512"), limit=3)
    assert run("run")[0] == 0 and not (tmp_path / "run/leaderboard.html").exists()
    code, _, err = run("run", "--leaderboard")
    assert (code, err) == (0, "") and run("run", "--check")[0] == 0
    page = tmp_path / "run" / "leaderboard.html"
    page.write_text(page.read_text().replace("snapkv", "other"))
    code, _, err = run("run", "--check")
    assert code == 1 and "leaderboard.html is not what the data say" in err.replace("\n", "")
    code, _, err = run("run", "--check", "--leaderboard")
    assert code == 2 and "leave out --leaderboard" in err
