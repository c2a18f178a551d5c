"""Folders of runs: full disks, damaged lines, ids that are not unique, and asking again."""

import errno
import json
import os
from dataclasses import replace

import pytest

from kvtrim import records
from kvtrim.bench.eval import scores
from kvtrim.bench.eval.evaluate import distinct
from kvtrim.errors import FileError, UsageError
from kvtrim.prompts.document import Document
from kvtrim.records import journal
from kvtrim.records.journal import Journal
from kvtrim.records.run_folder import RunFolder
from kvtrim.tasks.base import Sample, Task

LINE = {"method": "knorm", "outcome": "ok", "note": "é" * 50}
KEY = {"task": "t", "method": "full", "keep": "", "protocol": "question-aware"}


def no_room(monkeypatch, left):
    """A disk with so many bytes of room, which takes what fits."""
    real, room = os.write, [left]

    def write(file, content):
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = real(file, bytes(content[: room[0]]))
        room[0] -= done
        return done

    monkeypatch.setattr(os, "write", write)


@pytest.mark.parametrize("left", [0, 1, 40, 101, 150])
def test_a_full_disk_loses_nothing_and_glues_nothing(tmp_path, monkeypatch, left):
    path = tmp_path / records.SPEED
    whole = Journal(path)
    whole.add(LINE)
    with monkeypatch.context() as patched:
        no_room(patched, left)
        with pytest.raises(FileError, match=r"No space left.*make room and ask for the same"):
            whole.extend([LINE, LINE])
    assert whole.lines == [LINE] == Journal(path).lines
    whole.add(LINE)
    assert Journal(path).lines == [LINE, LINE]


def test_a_line_cut_off_anywhere_does_not_count(tmp_path):
    path = tmp_path / records.SPEED
    Journal(path).extend([LINE, LINE])
    whole = path.read_bytes()
    for end in range(len(whole) // 2, len(whole) - 1):  # also in the middle of a letter
        path.write_bytes(whole[:end])
        assert Journal(path).lines == [LINE]
        assert path.read_bytes() == whole[: len(whole) // 2]


DAMAGED = [
    "{",
    "[1]",
    "null",
    "\0" * 20,
]
DAMAGED += ['{"method": "\\ud800", "outcome": "ok"}', "[" * 2000, '{"a"' + json.dumps(LINE)]


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_line_is_named_and_the_file_is_left_alone(tmp_path, damage):
    path = tmp_path / records.SPEED
    Journal(path).add(LINE)
    path.write_text(path.read_text() + damage + "\n" + json.dumps(LINE) + "\n" + "half")
    before = path.read_bytes()
    with pytest.raises(FileError, match=r"speed\.jsonl:2: .*remove it and the lines behind it"):
        Journal(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", [{}, {"method": 3, "outcome": "ok"}, {"method": "a"}])
def test_a_line_that_lacks_what_it_must_hold_is_named_where_it_is_read(tmp_path, line):
    path = tmp_path / records.SPEED
    Journal(path).extend([LINE, line])
    assert Journal(path).lines == [LINE, line]
    with pytest.raises(FileError, match=r"speed\.jsonl:2: its '\w+' is damaged; remove it"):
        records.lines(path)


BATCH = {"method": "knorm", "keep": "9", "length": 8, "batch": 2, "fits": True}


@pytest.mark.parametrize("wrong", [{"batch": "2"}, {"fits": 1}, {"token_s": None}])
def test_tries_of_a_batch_are_read_as_what_they_are(tmp_path, wrong):
    path = tmp_path / records.SPEED
    Journal(path).extend([BATCH, LINE])
    assert records.lines(path) == [BATCH, LINE]
    Journal(path).add(BATCH | wrong)
    (name,) = wrong
    with pytest.raises(FileError, match=rf"speed\.jsonl:3: its '{name}' is damaged"):
        records.lines(path)


@pytest.mark.parametrize("damage", ["", "{", "[]", "5", "[" * 2000, '{"a": "\\ud800"}'])
def test_a_damaged_record_is_one_error_where_something_was_measured(tmp_path, damage):
    folder = tmp_path / "run"
    with journal.open_run(folder, {"a": 1}) as (begun, _):
        begun.add(LINE)
    (folder / "run.json").write_text(damage)
    with pytest.raises(FileError, match=r"cannot read .*run\.json"):
        journal.begin(folder, {"a": 1})
    (folder / records.SPEED).write_text("")
    assert journal.begin(folder, {"a": 1}) == {"a": 1}  # nothing was lost with it


def test_what_was_refused_before_its_first_line_does_not_block_the_folder(tmp_path):
    folder = tmp_path / "run"
    journal.begin(folder, {"a": 1, "date": "Monday"})
    assert journal.begin(folder, {"a": 1, "date": "Tuesday"})["date"] == "Monday"
    with journal.open_run(folder, {"a": 2}) as (begun, record):
        assert record == json.loads((folder / "run.json").read_text()) == {"a": 2}
        begun.add(LINE)
    with pytest.raises(UsageError, match="holds another run: a: 2 there, 3 here"):
        journal.begin(folder, {"a": 3})


def test_a_sweep_with_samples_in_one_of_its_folders_is_not_replaced(tmp_path):
    folder = tmp_path / "sweep"
    journal.begin(folder, {"a": 1}, records.SAMPLES, "sweep.json")
    (folder / "job" / "parts" / "0").mkdir(parents=True)
    (folder / "job" / "parts" / "0" / records.SAMPLES).write_text("x\n")
    with pytest.raises(UsageError, match="holds another run"):
        journal.begin(folder, {"a": 2}, records.SAMPLES, "sweep.json")


def test_a_run_that_another_process_has_just_begun_is_not_replaced(tmp_path):
    folder = tmp_path / "run"
    journal.begin(folder, {"a": 1})
    with journal.lock(folder), pytest.raises(UsageError, match="another process is measuring"):
        journal.begin(folder, {"a": 2})


def test_nobody_else_measures_in_a_folder_while_its_journal_is_open(tmp_path):
    folder = tmp_path / "run"
    for _ in range(2):  # a new run, and one that is gone on with
        with journal.open_run(folder, {"a": 1}) as (begun, _):
            begun.add(LINE)
            for record in ({"a": 1}, {"a": 2}):
                with pytest.raises(UsageError, match="another process is measuring in"):
                    journal.begin(folder, record)
    assert journal.begin(folder, {"a": 1}) == {"a": 1}
    assert Journal(folder / records.SPEED).lines == [LINE, LINE]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_closed_folder_is_one_error(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir(mode=0o500)
    with pytest.raises(FileError, match="cannot write"):
        journal.begin(folder, {"a": 1})


def unit(number):
    inputs = [{"task": "t", "sample": f"{number}", "group": {}, "sha256": "x"}]
    keys = [KEY | {"sample": f"{number}"}]
    return inputs, keys, [key | {"outcome": "ok"} for key in keys]


@pytest.mark.parametrize("name", [records.INPUTS, records.SAMPLES, records.TIMES])
def test_lines_that_were_taken_out_are_measured_again_and_none_beside_them(tmp_path, name):
    book = RunFolder(tmp_path)
    for number in range(3):
        inputs, keys, lines = unit(number)
        assert not book.holds(inputs, keys)
        book.add(inputs, lines, keys)
    book.close()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    path = tmp_path / name
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:1]))
    book, again = RunFolder(tmp_path), []
    for number in range(3):
        inputs, keys, lines = unit(number)
        if not book.holds(inputs, keys):
            again.append(number)
            book.add(inputs, lines, keys)
    book.close()
    assert again == [1, 2]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def sample(own, answer="a"):
    return Sample(own, Document("text"), "?", (answer,))


def test_rows_that_share_an_id_are_told_apart():
    given = [sample("1", "a"), sample("1", "b"), sample("1#2", "c"), sample("2"), sample("1", "d")]
    found = distinct(given)
    assert len({one.id for one in found}) == 5
    assert [one.answers for one in found] == [one.answers for one in given]
    assert [one.id for one in found][:2] == ["1", "1#2"] and found[3].id == "2"
    assert distinct(given) == found == distinct(found)


def test_each_answer_is_scored_against_its_own_row():
    samples = distinct([sample("1", answer) for answer in "abc"])
    right = Task("t", 1, "", "", "m", 4, iter, lambda text, one: text == one.answers[0])
    inputs = [
        {"task": "t", "sample": one.id, "group": {}, "answers": list(one.answers)}
        | {"prefix": "", "extra": {}}
        for one in samples
    ]
    lines = [
        KEY | {"sample": one.id, "answer": one.answers[0], "outcome": "ok"} for one in samples
    ]
    assert [row["score"] for row in scores.score_answers(inputs, lines, {"t": right})] == [1.0] * 3
    twice = [line | {"sample": "1"} for line in inputs]
    with pytest.raises(UsageError, match="two samples '1' of t"):
        list(scores.score_answers(twice, lines, {"t": right}))
    with pytest.raises(UsageError, match="lacks sample '1#2' of t"):
        list(scores.score_answers(inputs[:1], lines, {"t": right}))


def test_ids_that_are_not_text_become_text():
    (one,) = distinct([replace(sample("1"), id=1)])  # pyright: ignore[reportArgumentType]
    assert one.id == "1"
