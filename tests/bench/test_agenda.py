"""Measurements within a time: what fits is done, failures are results, nothing stops the rest."""

import sys
import time

import pytest

from kvtrim.bench.speed import agenda
from kvtrim.bench.speed.agenda import Agenda, Item, Unfinished

HERE = {"device": "a GPU", "code": "1"}


class Clock:
    """Time that passes only while something is measured."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def item(self, name, takes, estimate=1.0, stage="s", fails=None, skip=""):
        def work():
            self.now += takes
            if fails is not None:
                raise fails
            return {"took": takes}

        return Item(stage, name, estimate, work, skip)


@pytest.fixture
def clock():
    return Clock()


def outcomes(folder, about=HERE):
    lines = Agenda([], folder, about).journal.lines
    return [(x["name"], x["outcome"]) for x in lines if x["outcome"] != "begun"]


def run(folder, clock, items, seconds=100.0, about=HERE, **options):
    return Agenda(items, folder, about).run(clock() + seconds, now=clock, **options)


def test_each_result_is_a_line_with_its_place_and_a_failure_stops_nothing(tmp_path, clock):
    bug = ValueError("of two\nlines")
    items = [clock.item("a", 1), clock.item("b", 1, fails=bug), clock.item("c", 1, skip="no room")]
    assert run(tmp_path, clock, [*items, clock.item("d", 2)]) == 0
    found = Agenda([], tmp_path, HERE).journal.lines
    assert outcomes(tmp_path) == [("a", "ok"), ("b", "failed"), ("c", "skipped"), ("d", "ok")]
    assert all(line["machine"] == HERE for line in found)
    assert [x["reason"] for x in found if "reason" in x] == ["ValueError: of two lines", "no room"]
    assert [x["figures"] for x in found if "figures" in x] == [{"took": 1}, {"took": 2}]


def test_none_is_begun_that_no_longer_fits_by_what_its_stage_really_took(tmp_path, clock):
    told = []
    items = [
        clock.item("a", 6, stage="slow", estimate=2),
        clock.item("b", 6, stage="slow", estimate=2),  # by now 6 are expected of it
        clock.item("c", 1, stage="quick", estimate=1),  # 3 are, by all that was measured
        clock.item("d", 1, stage="quick", estimate=1),
    ]
    run(tmp_path, clock, items, seconds=10.0, tell=told.append)
    assert outcomes(tmp_path) == [("a", "ok"), ("c", "ok"), ("d", "ok")]
    assert told[-1] == "1 were left to a further run: slow: b"
    run(tmp_path, clock, items, seconds=10.0)
    assert outcomes(tmp_path)[3:] == [("b", "ok")]


def test_preparations_are_not_part_of_what_a_measurement_took(tmp_path, clock):
    spent = iter([0.0, 4.0])
    run(tmp_path, clock, [clock.item("a", 5)], setup=lambda: next(spent))
    assert Agenda([], tmp_path, HERE).journal.lines[-1]["seconds"] == 1.0


def test_a_further_run_repeats_failures_of_other_code_and_figures_of_other_devices(
    tmp_path, clock
):
    items = [clock.item("a", 1), clock.item("b", 1, fails=ValueError("bug"))]
    for _ in range(2):
        run(tmp_path, clock, items)
        assert outcomes(tmp_path) == [("a", "ok"), ("b", "failed")]
    run(tmp_path, clock, [clock.item("a", 1), clock.item("b", 1)], about=HERE | {"code": "2"})
    assert outcomes(tmp_path)[2:] == [("b", "ok")]
    run(tmp_path, clock, [clock.item("a", 1)], about=HERE | {"device": "another"})
    assert outcomes(tmp_path)[3:] == [("a", "ok")]


def test_what_ran_out_of_time_in_the_middle_is_gone_on_with(tmp_path, clock):
    run(tmp_path, clock, [clock.item("a", 1, fails=Unfinished("later"))])
    run(tmp_path, clock, [clock.item("a", 1)])
    assert outcomes(tmp_path) == [("a", "unfinished"), ("a", "ok")]


def test_a_process_that_cannot_measure_any_more_says_so(tmp_path, clock):
    items = [clock.item("a", 1, fails=RuntimeError("illegal access")), clock.item("b", 1)]
    assert run(tmp_path, clock, items, broken=lambda: True) == 3
    assert outcomes(tmp_path) == [("a", "failed")]


MEASURING = """
import os, sys, time
from pathlib import Path
from kvtrim.bench.speed import agenda

agenda._SETUP = 0.5
items = [
    agenda.Item("s", "first", 0.2, dict),
    agenda.Item("s", "takes the process with it", 0.2, lambda: os._exit(9)),
    agenda.Item("s", "hangs", 0.2, lambda: time.sleep(600)),
    agenda.Item("s", "last", 0.2, dict),
]
until = time.time() + 60
sys.exit(agenda.Agenda(items, Path(sys.argv[1]), {"device": "d", "code": "1"}).run(until))
"""


def test_neither_a_hanging_measurement_nor_a_dying_process_takes_the_rest_along(
    tmp_path, capfd, monkeypatch
):
    script = tmp_path / "measuring.py"
    script.write_text(MEASURING)
    begin = time.time()
    command = [sys.executable, str(script), str(tmp_path)]
    agenda.watch(command, tmp_path, begin + 90, {"PYTHONPATH": ":".join(filter(None, sys.path))})
    assert time.time() - begin < 60
    assert outcomes(tmp_path, {"device": "d"}) == [
        ("first", "ok"),
        ("takes the process with it", "ended"),
        ("hangs", "ended"),
        ("last", "ok"),
    ]
    assert capfd.readouterr().err.count("going on behind it") == 2


def test_a_process_that_measures_nothing_is_not_started_again_and_again(tmp_path):
    script = tmp_path / "broken.py"
    mark = tmp_path / "starts"
    script.write_text(f"open({str(mark)!r}, 'a').write('x'); raise SystemExit(1)")
    agenda.watch([sys.executable, str(script)], tmp_path, time.time() + 60, {})
    assert mark.read_text() == "x"
