"""Folders that hold the same samples: joined as far as rounding explains, and that is said."""

import json

import pytest
from synthetic import evaluation

from kvtrim.errors import UsageError
from kvtrim.report import gaps, results
from kvtrim.report.document import chapters

TASKS = ["longbench-qasper"]


def pair(tmp_path, **changed):
    """The same run twice; the second with another record."""
    places = [evaluation(tmp_path / name, TASKS, ["snapkv"], ["128"]) for name in ("v1", "v2")]
    record = json.loads((places[1] / "run.json").read_text())
    dtype, batch = changed.pop("dtype", "float32"), changed.pop("batch", 1)
    record |= {"batch": batch, "machine": record["machine"] | changed}
    record["model"]["dtype"] = dtype
    (places[1] / "run.json").write_text(json.dumps(record))
    return places


def edit(place, change, name="samples.jsonl"):
    rows = [json.loads(line) for line in (place / name).read_text().splitlines()]
    rows[-1] |= {key: how(rows[-1][key]) for key, how in change.items()}
    (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def joined(places):
    sections, speeds = results.read_results(places)
    return sections, chapters(sections, speeds)[0].about


def test_figures_that_are_the_same_are_joined_without_a_word(tmp_path):
    sections, about = joined(pair(tmp_path, batch=16))
    assert not sections[0].remarks and "v2" not in about


@pytest.mark.parametrize("by", [1e-12, 1e-9, 1e-5])
def test_losses_of_other_batches_may_differ_as_rounding_does_and_that_is_said(tmp_path, by):
    places = pair(tmp_path, batch=16)
    edit(places[1], {"loss": lambda loss: loss + by, "kl": lambda kl: kl - by})
    sections, about = joined(places)
    (remark,) = sections[0].remarks
    assert "batches of 1 and 16" in remark and f"loss by up to {by:.2g}" in remark
    assert remark in about and remark in gaps.notes([], sections)


@pytest.mark.parametrize("changed", [{"threads": 3}, {"device": "another"}, {"code": "other"}])
def test_so_may_those_of_another_machine(tmp_path, changed):
    places = pair(tmp_path, **changed)
    edit(places[1], {"loss": lambda loss: loss + 1e-5})
    assert len(joined(places)[0][0].remarks) == 1


def test_the_ninth_digit_of_a_sum_needs_no_excuse(tmp_path):
    places = pair(tmp_path)
    edit(places[1], {"loss": lambda loss: loss * (1 + 1e-9)})
    assert len(joined(places)[0][0].remarks) == 1


def test_an_answer_may_go_another_way_in_another_batch_and_in_no_other_case(tmp_path):
    for name, batch in (("other", 16), ("same", 1)):
        places = pair(tmp_path / name, batch=batch)
        edit(places[1], {"answer": lambda _: "quite another"})
        edit(places[1], {"score": lambda _: 0.123}, "scores.jsonl")
        if batch == 1:
            with pytest.raises(UsageError, match=r"\(answer\): report them apart"):
                joined(places)
        else:
            assert "1 of 24 answers" in joined(places)[0][0].remarks[0]


@pytest.mark.parametrize(
    ("name", "change", "batch", "dtype"),
    [
        ("loss", lambda loss: loss + 1e-3, 16, "float32"),
        ("loss", lambda loss: loss + 1e-3, 1, "float32"),
        ("loss", lambda loss: loss + 0.5, 16, "bfloat16"),
        ("kl", lambda kl: None, 16, "float32"),
        ("held_bytes", lambda held: held + 1, 16, "float32"),
        ("outcome", lambda _: "oom", 16, "float32"),
    ],
)
def test_what_rounding_does_not_explain_is_refused_with_its_name(
    tmp_path, name, change, batch, dtype
):
    places = pair(tmp_path, batch=batch, dtype=dtype)
    edit(places[1], {name: change})
    with pytest.raises(UsageError, match=rf"disagree about snapkv 128.*{name}.*report them apart"):
        joined(places)


def test_halves_have_fewer_digits(tmp_path):
    places = pair(tmp_path, batch=16, dtype="bfloat16")
    edit(places[1], {"loss": lambda loss: loss + 0.02})
    assert len(joined(places)[0][0].remarks) == 1
