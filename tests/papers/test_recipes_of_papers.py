"""Recipes: whole, runnable, and drawn as the papers draw them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kvtrim.bench.analyses.registry import ANALYSES
from kvtrim.bench.sweep.spec import settle
from kvtrim.errors import UnknownNameError, UsageError
from kvtrim.papers import recipe as known
from kvtrim.report import papers, results
from kvtrim.report.lookup import View
from kvtrim.report.papers_manual import manual
from kvtrim.report.published_scores import find_task, printed_scores
from report.synthetic import LONGBENCH, evaluation, longbench, speed

PAGE = Path(__file__).parents[2] / "docs" / "papers.md"
NOT_A_TABLE = {"table-7-no-instruct"}  # copied from another benchmark, by the source's own mistake
RUN = [one for one in known.recipes() if one.kind == "eval"]
LLAMA = "meta-llama/Llama-3.1-8B-Instruct"


def test_every_published_table_has_a_recipe():
    for paper in known.papers():
        used = {
            table["id"] for one in known.recipes() if one.paper == paper for table in one.tables
        }
        stems = {"fastkv": ("fastkv", "fastkv-scores")}.get(paper, (paper,))
        places = [known.FOLDER / f"{stem}.json" for stem in stems]
        there = [json.loads(path.read_text()) for path in places if path.exists()]
        printed = {table["id"] for one in there for table in one["tables"]}
        assert printed - used - NOT_A_TABLE == set()
    assert len({one.name for one in known.recipes()}) == len(known.recipes())
    assert all(one.reason for one in known.recipes() if one.kind == "reason")
    assert {one.analyze for one in known.recipes() if one.kind == "analyze"} <= {*ANALYSES}


@pytest.mark.parametrize("one", RUN, ids=lambda one: one.name)
def test_a_recipe_is_a_sweep_that_can_be_asked_for(one):
    for name in one.models:
        made = settle(one.sweep(name) | {"models": ["m"]}, one.name, Path())
        assert made.spec.truncate_at == one.truncation(name)
        job = made.jobs()[0]
        assert job.protocol == one.protocol and {*job.grid().tasks}
        labels = {cell.label for cell in job.grid().cells}
        assert labels == {"full", *one.methods.values()}


def test_what_is_asked_for_otherwise_is_in_the_sweep():
    one = known.find("circuitkv/results-128")
    own = one.sweep("Llama-3-8B-Instruct", limit=3, lengths=[512], max_new_tokens=5)
    assert (own["limit"], own["lengths"], own["max_new_tokens"]) == (3, [512], 5)
    assert (own["truncate_at"], own["chat"]) == (7950, False)
    assert one.sweep("mine")["truncate_at"] == 127500


def test_names_and_models_are_found():
    with pytest.raises(UnknownNameError, match="did you mean 'curdkv/table-2'"):
        known.find("curdkv/table2")
    with pytest.raises(UsageError, match="kvtrim analyze leverage"):
        known.require_run(known.find("curdkv/figure-3"))
    with pytest.raises(UsageError, match="nothing to run: texts"):
        known.require_run(known.find("curdkv/tables-5-to-12"))
    nemo = known.find("fastkv/table-4")
    assert known.paper_model(nemo, "mistralai/Mistral-Nemo-Instruct-2407") in nemo.models
    assert known.paper_model(nemo, "smollm2") == "smollm2"


def test_whatever_runs_was_tried_or_says_why_not():
    told = {one.name: one.tried for one in known.recipes() if one.kind != "reason"}
    assert {*told} == {*json.loads((known.FOLDER / "tried.json").read_text())}
    began = ("ran and drew: `", "not yet: ")
    assert [name for name, text in told.items() if not text.startswith(began)] == []


def test_the_page_is_what_the_recipes_say():
    assert PAGE.read_text(encoding="utf-8") == manual()


def drawn(name, *folders):
    found = papers.draw(known.find(name), *results.read_results(folders))
    return found[0].table, found[0].differences


def test_a_table_is_drawn_in_the_papers_shape_with_its_figures_where_settings_match(tmp_path):
    one = known.find("kvfundabench/table-5")
    labels = [text for text in one.methods.values() if text != "full"]
    folder = evaluation(
        tmp_path / "a", ["gsm8k-8"], labels, ["10%", "20%"], LLAMA, "question-aware"
    )
    table, told = drawn(one.name, folder)
    assert table.cells.headings == [
        "keep", "method", "whose", "gsm8k-8", "average"
    ]  # fmt: skip
    rows = {(keep, method, whose): cell for keep, method, whose, cell, _ in table.cells.rows}
    assert rows["all", "full", "published"] == "79.45" and ("10%", "snapkv", "ours") in rows
    assert [
        method for keep, method, whose, *_ in table.cells.rows if keep == "10%" and whose == "ours"
    ] == [name for name in one.methods if name != "full"]
    assert "samples: at most 12 of a task" in told and "not measured: keep 30%" in told
    assert not any("protocol" in line or "model" in line for line in told)


def test_of_another_model_or_protocol_nothing_published_is_shown(tmp_path):
    methods = ["snapkv", "snapkv:preset=kvf"]
    place = evaluation(tmp_path / "a", ["gsm8k-8"], methods, ["10%"], protocol="question-agnostic")
    table, told = drawn("kvfundabench/table-5", place)
    assert {row[2] for row in table.cells.rows} == {"ours"}
    assert any(line.startswith("the model: smollm2 here") for line in told)
    assert "the protocol: question-agnostic here, question-aware there" in told
    assert "not the paper's: snapkv" in told and "not measured: h2o" in told


def test_what_was_refused_is_said(tmp_path):
    place = evaluation(tmp_path / "a", ["gsm8k-8"], ["snapkv:preset=kvf"], ["10%"])
    path = place / "samples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line | {"outcome": "refused", "reason": "too narrow"} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, told = drawn("kvfundabench/table-5", place)
    assert "refused: gsm8k-8, every method: too narrow" in told

    ours = [
        line if line["method"] == "full" else line | {"outcome": "ok", "reason": ""}
        for line in lines
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in ours))
    _, told = drawn("kvfundabench/table-5", place)
    assert "refused: gsm8k-8, full all: too narrow" in told


def test_speed_is_drawn_with_what_differs(tmp_path):
    table, told = drawn("fastkv/table-5", speed(tmp_path / "s", ["snapkv:preset=fastkv-v1"]))
    assert table.cells.rows and any("lengths: 1024, 4096 here" in line for line in told)


def test_what_a_paper_prints_is_drawn_alone():
    made = papers.tables_in_print(known.find("curdkv/table-17"))
    (table,) = made
    assert ["10%", "key"] in [list(row[:2]) for row in table.cells.rows] and len(
        table.cells.rows
    ) == 12
    assert papers.tables_in_print(known.find("laprox/longbench")) == []


def test_tasks_that_were_left_out_are_said_and_headings_are_the_papers(tmp_path):
    one, tasks = known.find("curdkv/table-2"), [longbench("qasper"), longbench("lcc")]
    place = evaluation(tmp_path / "a", tasks, [one.methods["snapkv"]], ["10%"])
    every = [longbench(name) for name in LONGBENCH]
    (found,) = papers.draw(one, *results.read_results([place]), tasks=every)
    assert found.table.cells.headings[3:] == ["qasper", "lcc", "average"]
    (missing,) = [one for one in found.differences if one.startswith("not measured: task")]
    assert "longbench-trec, " in missing and "longbench-lcc" not in missing


def test_the_folder_of_another_table_is_told(tmp_path):
    one = known.find("curdkv/table-2")
    labels = [known.find("circuitkv/results-256").methods["snapkv"]]
    place = evaluation(tmp_path / "a", [longbench("lcc")], labels, ["256"])
    (found,) = papers.draw(one, *results.read_results([place]), tasks=[longbench("lcc")])
    assert any("is this the folder of another table?" in line for line in found.differences)
    assert papers.draw(one, *results.read_results([place]), tasks=["gsm8k-8"]) == []
    assert papers.draw(one, *results.read_results([place]), tasks=["longbench"]) != []


def test_categories_stand_beside_the_papers_where_all_their_tasks_do(tmp_path):
    one, tasks = known.find("circuitkv/results-512"), [longbench(name) for name in LONGBENCH]
    labels = [one.methods[name] for name in ("snapkv", "pyramidkv")]
    folder = evaluation(
        tmp_path / "a", tasks, labels, ["512"], model=LLAMA, protocol="question-aware"
    )
    record = json.loads((folder / "run.json").read_text())
    record |= {"chat": False, "truncate_at": 127500}
    (folder / "run.json").write_text(json.dumps(record))
    _, found = papers.draw(one, *results.read_results([folder]))
    rows = {(method, whose): cells for _, method, whose, *cells in found.table.cells.rows}
    assert rows["snapkv", "published"][:2] == ["21.86", "13.52"]
    assert rows["snapkv", "published"][-1] == "37.96"
    view = View(results.read_results([folder])[0][0])
    own = view.mean(tasks[:3], (labels[0], "512"))
    assert own is not None and rows["snapkv", "ours"][0].startswith(f"{100 * own.value:.1f} ")
    assert ("h2o", "published") not in rows

    inputs = (folder / "inputs.jsonl").read_text()
    cut = inputs.replace('"group": {}', '"group": {}, "truncated": true')
    (folder / "inputs.jsonl").write_text(cut)
    first, found = papers.draw(one, *results.read_results([folder]))
    assert {row[2] for row in [*first.table.cells.rows, *found.table.cells.rows]} == {"ours"}
    assert not any("prompts cut" in cell for row in first.table.cells.rows for cell in row)
    (told,) = [line for line in first.differences if line.startswith("prompts cut by --length")]
    assert "longbench-qasper (12 of 12)" in told
    (folder / "inputs.jsonl").write_text(inputs)

    record["max_new_tokens"] = 4
    (folder / "run.json").write_text(json.dumps(record))
    _, found = papers.draw(one, *results.read_results([folder]))
    assert {row[2] for row in found.table.cells.rows} == {"ours"}, "answers were shorter"


def test_what_a_text_says_of_a_figure_is_shown_where_length_and_budget_are_the_same(tmp_path):
    one = known.find("curdkv/figure-4")
    (table,) = papers.tables_in_print(one)
    said = ["131072", "20%", "per token", "about 4.5 s", "12 s", "x0.38"]
    assert said in [list(row[:6]) for row in table.cells.rows]
    label, told = one.methods["curdkv"], {}
    for model, length in ((LLAMA, 131072), (LLAMA, 65536), ("smollm2", 131072)):
        folder = speed(tmp_path / f"{length}-{len(told)}", [label], [length], "26214")
        record = json.loads((folder / "run.json").read_text())
        record["model"]["name"] = model
        (folder / "run.json").write_text(json.dumps(record))
        text = (folder / "speed.jsonl").read_text().replace('"26214"', '"20%"')
        (folder / "speed.jsonl").write_text(text)
        told[model, length] = [
            line for line in drawn(one.name, folder)[1] if line.startswith("published")
        ]
    there = "published: held, 131,072 tokens, 20% kept: under 2 of 16 GB, x0.12; here x0.20"
    assert there in told[LLAMA, 131072] and len(told[LLAMA, 131072]) == 3
    assert told[LLAMA, 65536] == told["smollm2", 131072] == []


@pytest.mark.parametrize(
    ("task", "same"), [("longgenbench-gsm8k", True), ("longgenbench-gsm8k-5", False)]
)
def test_a_variant_of_a_task_is_not_taken_for_it(tmp_path, task, same):
    place = evaluation(tmp_path / "a", [task], ["shotkv"], ["40%"])
    view = View(results.read_results([place])[0][0])
    one = replace(printed_scores()[0], task="longgenbench_gsm8k", shots=None)
    assert find_task(view, one.task, one) == (task if same else None)
