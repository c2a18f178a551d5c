"""A finished run takes one more method or budget: only what is new is measured."""

import json
import os

import pytest
import torch

import models
from bench.test_evaluate import AGNOSTIC, AWARE, asked, finished, lines, run, same
from kvtrim.bench.eval import evaluate, extension, runner
from kvtrim.errors import UsageError

assert finished  # the runs that tests begin with


@pytest.fixture(scope="module")
def subject():
    model = models.tiny("llama", dtype=torch.float32)
    return evaluate.Subject("tiny", model, models.tokenizer())


def record(folder):
    own = json.loads((folder / "run.json").read_text())
    return own | {"machine": own["machine"]["code"]}


@pytest.mark.parametrize("protocol", [AWARE, AGNOSTIC])
def test_the_files_are_those_of_one_run_of_all(subject, tmp_path, protocol):
    """Answered one by one, to the last bit; a method, then a budget."""
    grown = tmp_path / "grown"
    for methods, keeps in (["snapkv"], ["48"]), (["h2o", "snapkv"], ["48"]), (
        ["h2o", "snapkv"], ["64", "48"],
    ):  # fmt: skip
        run(subject, asked(methods=methods, keeps=keeps, protocol=protocol), grown)
    whole = asked(methods=["h2o", "snapkv"], keeps=["64", "48"], protocol=protocol)
    run(subject, whole, tmp_path / "whole")
    assert same(grown) == same(tmp_path / "whole")
    assert record(grown) == record(tmp_path / "whole")
    assert len(lines(grown, "times.jsonl")) == len(lines(grown))
    assert sorted(path.name for path in grown.iterdir()) == [
        "inputs.jsonl", "run.json", "samples.jsonl", "times.jsonl",
    ]  # fmt: skip
    before = {path: path.stat().st_mtime_ns for path in grown.iterdir()}
    run(subject, whole, grown)  # there is nothing left to do
    assert {path: path.stat().st_mtime_ns for path in grown.iterdir()} == before


def test_answers_generated_together_say_the_same(subject, tmp_path):
    first, more = asked(methods=["snapkv"], batch=8), asked(methods=["snapkv", "h2o"], batch=8)
    there = run(subject, first, tmp_path / "grown")
    both = run(subject, more, tmp_path / "grown")
    whole = run(subject, more, tmp_path / "whole")
    assert [line for line in both if line["method"] != "h2o:window=8"] == there
    for one, other in zip(both, whole, strict=True):
        assert one["kl"] == (None if other["kl"] is None else pytest.approx(other["kl"], abs=1e-5))
        assert {**one, "kl": 0, "loss": 0} == {**other, "kl": 0, "loss": 0}


def test_only_new_cells_answer(subject, finished, tmp_path, monkeypatch):
    finished(asked(methods=["snapkv"]), tmp_path / "run")
    rows, answers = [], runner.answers

    def counted(model, tokenizer, branch, *more):
        rows.append(branch.rows)
        return answers(model, tokenizer, branch, *more)

    monkeypatch.setattr(runner, "answers", counted)
    run(subject, asked(methods=["snapkv", "h2o"], keeps=["48", "64"]), tmp_path / "run")
    assert sum(rows) == 2 * 3  # of two samples: snapkv 64, h2o 48 and 64


def test_whatever_else_differs_is_refused(subject, finished, tmp_path):
    folder = finished(asked(methods=["snapkv"]), tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for changed, named in (
        (asked(methods=["snapkv", "h2o"], limit=1), "limit: 2 there, 1 here"),
        (asked(methods=["snapkv", "h2o"], seed=1), "seed: 0 there, 1 here"),
        (asked(methods=["snapkv", "h2o"], settings={"window": "4"}), "methods"),
        (asked(methods=["h2o"]), "methods"),
    ):
        with pytest.raises(UsageError, match=f"holds another run: {named}"):
            run(subject, changed, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_that_was_cut_off_is_finished_first(subject, finished, tmp_path):
    first, more = asked(methods=["snapkv"]), asked(methods=["snapkv", "h2o"])
    finished(first, tmp_path / "run")
    samples = tmp_path / "run" / "samples.jsonl"
    samples.write_text("".join(samples.read_text().splitlines(True)[:3]))
    run(subject, more, tmp_path / "run")
    assert same(tmp_path / "run") == same(finished(more))


@pytest.mark.parametrize("at", range(1, 5))
def test_one_killed_while_files_move_goes_on(subject, finished, tmp_path, monkeypatch, at):
    first, more = asked(methods=["snapkv"]), asked(methods=["snapkv", "h2o"])
    folder = finished(first, tmp_path / "run")
    real, moved = os.replace, []

    def replace(source, target):
        if str(source).endswith("joined/" + os.path.basename(target)):
            moved.append(target)
            if len(moved) == at:
                raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(extension.os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            run(subject, more, folder)
    run(subject, more, folder)
    assert same(folder) == same(finished(more))
    assert record(folder) == record(finished(more))
    assert not (folder / extension.PARTS).exists()
