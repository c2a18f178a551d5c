"""`kvtrim papers` as a user types it."""

import json
import shutil

import pytest

from report.synthetic import evaluation, speed


def test_the_list_and_what_is_printed(invoke):
    code, out, _ = invoke("papers", "--json")
    listed = {one["name"]: one for one in json.loads(out)}
    assert code == 0 and listed["curdkv/table-2"]["command"] == "kvtrim papers run curdkv/table-2"
    assert listed["curdkv/figure-3"]["command"] == "kvtrim analyze leverage"
    code, out, _ = invoke("papers", "show", "kvfundabench/table-5", "--json")
    assert code == 0 and len(json.loads(out)) == 2  # two models


def test_a_variant_of_a_task_may_stand_for_it(invoke, tmp_path):
    asked = ("papers", "run", "kvfundabench/table-2", "--out", "x", "--data", tmp_path)
    code, _, err = invoke(*asked, "--task", "longgenbench-gsm8k-5", "--model", tmp_path)
    assert code != 0 and "--task" not in err, "it is refused for other reasons"


def test_a_recipe_runs_and_is_drawn(invoke, model_folder, tmp_path):
    (tmp_path / "data").mkdir()
    text = "A sentence of an essay about small and large things. " * 400
    (tmp_path / "data" / "essays.txt").write_text(text)
    few = (
        "--task",
        "niah",
        "--limit",
        1,
        "--length",
        448,
        "--max-new-tokens",
        2,
        "--keep",
        512,
        "--threads",
        1,
    )
    run = (
        "papers",
        "run",
        "fastkv/figure-needle",
        "--model",
        model_folder,
        "--data",
        "data",
        *few,
    )
    code, out, err = invoke(*run, "--out", "run")
    assert code == 0, err
    assert "kvtrim papers show fastkv/figure-needle run" in " ".join(out.split())
    code, out, err = invoke("papers", "show", "fastkv/figure-needle", "run", "--json")
    assert code == 0, err
    (first, *_) = json.loads(out)
    assert any("the model" in line for line in first["differences"]) and first["rows"]


def test_models_of_one_name_have_folders_of_their_own(invoke, model_folder, tmp_path):
    for owner in ("a", "b"):
        shutil.copytree(model_folder, tmp_path / owner / "same")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "essays.txt").write_text("A sentence about small things. " * 400)
    few = ("--task", "niah", "--limit", 1, "--length", 448, "--max-new-tokens", 2)
    few += ("--keep", 512, "--threads", 1, "--data", "data")
    named = ("--model", "a/same", "--model", "b/same", "--model", "a/same")
    code, _, err = invoke("papers", "run", "fastkv/figure-needle", *named, *few, "--out", "run")
    assert code == 0, err
    assert sorted(place.name for place in (tmp_path / "run").iterdir()) == ["a-same", "b-same"]
    code, out, err = invoke("papers", "show", "fastkv/figure-needle", "run", "--json")
    titles = " ".join(one["title"] for one in json.loads(out))
    assert code == 0 and "a/same" in titles and "b/same" in titles, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "curdkv/table2", "--out", "x"), "did you mean"),
        (("run", "curdkv/figure-3", "--out", "x"), "kvtrim analyze leverage"),
        (("run", "curdkv/table-2", "--out", "x", "--keep", "11%"), "has 70%, 10%"),
        (
            ("run", "curdkv/table-2", "--out", "x", "--task", "gsm8k-8"),
            "has longbench-narrativeqa",
        ),
        (("run", "curdkv/figure-4", "--out", "x", "--task", "gsm8k-8"), "measures seconds"),
        (("run", "curdkv/table-2", "--out", "no/x"), "there is no folder"),
        (("run", "curdkv/table-2", "--out", "x", "--config", "llama-3.1-8b"), "use --model"),
        (
            ("run", "fastkv/table-5", "--out", "x", "--limit", 1),
            "--limit changes nothing in fastkv/table-5, which measures seconds",
        ),
        (("run", "fastkv/table-5", "--out", "x", "--ray"), "--ray changes nothing"),
        (("run", "curdkv/table-2", "--out", "x", "--repeats", 2), "--repeats counts rounds"),
        (("show", "laprox/longbench"), "nothing printed of laprox/longbench"),
        (("show", "curdkv/tables-5-to-12"), "nothing to run"),
    ],
)
def test_mistakes_are_named(invoke, arguments, message):
    code, _, err = invoke("papers", *arguments)
    assert code == 2 and message in err and err.count("\n") == 1


def test_times_in_print_and_the_folder_of_another_table(invoke, tmp_path):
    code, out, _ = invoke("papers", "show", "fastkv/table-5")
    assert code == 0 and "14.15 s" in out and "hardware" in out
    speed(tmp_path / "timed")
    code, _, err = invoke("papers", "show", "curdkv/table-2", "timed")
    assert code == 2 and "measure it with kvtrim papers run curdkv/table-2" in err
    evaluation(tmp_path / "asked", ["gsm8k-8"], ["snapkv"], ["64"])
    code, _, err = invoke("papers", "show", "curdkv/table-2", "asked")
    assert code == 2 and "holds no run of curdkv/table-2: name another folder" in err
