"""Ranks, sensitivity and frontiers of made-up folders, against figures worked out by hand."""

import json
from math import inf, sqrt
from statistics import fmean

import pytest
import synthetic

from kvtrim.errors import UsageError
from kvtrim.report import frontiers, rank_tests, results
from kvtrim.report.frontiers import COSTS, Point, front, frontier
from kvtrim.report.rank_tests import friedman, rank
from kvtrim.report.sensitivity import sensitivity
from kvtrim.report.statistics import Figure

TASKS = ("niah-a", "gsm8k-8", "mmlu-5", "csqa-4")
METHODS = ("snapkv", "h2o", "knorm")
KEEPS = ("64", "512")


@pytest.fixture
def folder(tmp_path):
    return synthetic.evaluation(tmp_path / "run", TASKS, METHODS, KEEPS)


def means(folder):
    """Mean score of each (method, keep, task), straight from the lines."""
    found = {}
    for line in (folder / "scores.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault((row["method"], row["keep"], row["task"]), []).append(row["score"])
    return {key: fmean(own) for key, own in found.items()}


def test_friedmans_statistic_and_nemenyis_difference():
    """Demsar's formulas without equals, and the constants of his table 5."""
    pytest.importorskip("scipy")
    scores = {
        "a": [9, 8, 9, 7, 8],
        "b": [5, 9, 4, 6, 5],
        "c": [1, 2, 3, 8, 1],
        "d": [3, 1, 2, 1, 2],
    }
    ranks = {
        "a": [1, 2, 1, 2, 1],
        "b": [2, 1, 2, 3, 2],
        "c": [4, 3, 3, 1, 4],
        "d": [3, 4, 4, 4, 3],
    }
    mean = {name: sum(own) / 5 for name, own in ranks.items()}
    k, n = 4, 5
    chi = 12 * n / (k * (k + 1)) * (sum(m * m for m in mean.values()) - k * (k + 1) ** 2 / 4)
    found = rank(scores)
    assert dict(found.methods) == pytest.approx(mean) and found.methods[0][0] == "a"
    assert found.statistic == pytest.approx(chi) and 0 < found.p < 0.05
    assert found.distance == pytest.approx(2.569 * sqrt(k * (k + 1) / (6 * n)), abs=2e-3)


def test_methods_that_are_equal_everywhere_do_not_differ():
    pytest.importorskip("scipy")
    found = rank({name: [1.0, 0.5] for name in "abc"})
    assert (found.statistic, found.p) == (0.0, 1.0)
    assert {rank for _, rank in found.methods} == {2.0}
    assert found.cliques == []  # no bar has a length


def test_cliques_are_the_longest_runs_within_the_difference():
    own = tuple(zip("abcde", (1.0, 1.5, 2.4, 4.0, 4.5), strict=True))
    made = rank_tests.Ranked(own, 9, 1.0, 0.1, 1.0)
    assert made.cliques == [(1.0, 1.5), (1.5, 2.4), (4.0, 4.5)]
    assert rank_tests.Ranked(own, 9, 1.0, 0.1, inf).cliques == [(1.0, 4.5)]


def test_methods_are_ranked_on_every_task(folder):
    pytest.importorskip("scipy")
    found, known = friedman(*results.read_results([folder])), means(folder)
    assert [panel["kind"] for panel in found.panels] == ["ranks"] * 2
    for keep in KEEPS:
        rows = {row[2]: row for row in found.rows if row[1] == keep}
        assert set(rows) == {*METHODS}
        expected = dict.fromkeys(METHODS, 0.0)
        for task in TASKS:
            own = {method: known[method, keep, task] for method in METHODS}
            for method, score in own.items():
                above = sum(other > score for other in own.values())
                alike = sum(other == score for other in own.values())
                expected[method] += (above + (alike + 1) / 2) / len(TASKS)
        for method, row in rows.items():
            assert row[3] == pytest.approx(expected[method])
            mean = fmean(known[method, keep, task] for task in TASKS)
            assert row[4] == pytest.approx(100 * mean)


def test_too_few_methods_are_refused_with_what_is_needed(tmp_path):
    pytest.importorskip("scipy")
    own = synthetic.evaluation(tmp_path / "few", TASKS, METHODS[:2], KEEPS)
    with pytest.raises(UsageError, match=r"2 methods on 4 tasks.*at least three methods"):
        friedman(*results.read_results([own]))


def test_a_task_is_as_sensitive_as_its_methods_on_average(folder):
    found, known = sensitivity(*results.read_results([folder])), means(folder)
    assert len(found.rows) == len(TASKS) * len(KEEPS) and len(found.panels) == 1
    for _, _, task, keep, held, change, least, most, count in found.rows:
        full = known["full", "", task]
        own = [100 * (known[method, keep, task] - full) / full for method in METHODS]
        assert (change, least, most) == pytest.approx((fmean(own), min(own), max(own)))
        share = int(min(1, float(keep) / 2000) * synthetic.FULL_BYTES) + 1000
        assert held == pytest.approx(100 * share / synthetic.FULL_BYTES) and count == 3


def test_models_are_compared_on_the_tasks_they_share(folder, tmp_path):
    base = synthetic.evaluation(tmp_path / "base", TASKS[:3], METHODS, KEEPS, "base", seed=4)
    found = sensitivity(*results.read_results([folder, base]))
    last = found.panels[-1]
    assert "3 shared tasks" in last["title"]
    assert [one["label"] for one in last["series"]] == ["smollm2", "base"]
    own = [row[5] for row in found.rows if row[0] == "base" and row[3] == "64"]
    assert last["series"][1]["y"][0] == pytest.approx(fmean(own))


def test_models_have_short_names_in_the_figure_and_those_left_out_are_named(folder, tmp_path):
    base = synthetic.evaluation(tmp_path / "base", TASKS, METHODS, KEEPS, "made/of/base", seed=4)
    none = synthetic.evaluation(tmp_path / "none", TASKS[:2], METHODS, KEEPS, "made/of/none")
    lines = (none / "scores.jsonl").read_text().splitlines()
    nothing = [json.dumps(json.loads(line) | {"score": 0.0}) for line in lines]
    (none / "scores.jsonl").write_text("\n".join(nothing) + "\n")
    found = sensitivity(*results.read_results([folder, base, none]))
    assert [one["label"] for one in found.panels[-1]["series"]] == ["smollm2", "base"]
    assert {row[0] for row in found.rows} == {"smollm2", "made/of/base"}
    assert found.about.endswith(f"are left out (made/of/none: {TASKS[0]}, {TASKS[1]}).")
    assert "(" not in sensitivity(*results.read_results([folder])).about.partition("Tasks on")[2]


def point(name, score, share, ttft=None, rate=None):
    return Point(name, "64", Figure(score, None, None, 1), 1.0, share, ttft, rate)


def test_the_front_holds_what_nothing_beats():
    own = [point("a", 0.5, 0.1), point("b", 0.4, 0.2), point("c", 0.9, 0.5), point("d", 0.9, 0.6)]
    cost = next(iter(COSTS))
    assert [p.method for p in front(own, cost)] == ["a", "c"]
    timed = [
        point("a", 0.5, 0.1, rate=50.0),
        point("b", 0.9, 0.1, rate=20.0),
        point("c", 0.1, 0.1),
    ]
    assert [p.method for p in front(timed, "tokens per second")] == ["a", "b"]
    for one in own:  # by the definition
        beaten = any(
            (other.score.value >= one.score.value and other.share <= one.share)
            and (other.score.value, -other.share) != (one.score.value, -one.share)
            for other in own
        )
        assert (one in front(own, cost)) == (not beaten)


def test_scores_and_bytes_stand_beside_seconds_of_the_same_model(tmp_path, folder):
    speed = synthetic.speed(tmp_path / "speed", METHODS[:2], keep="64")
    found = frontier(*results.read_results([folder, speed]))
    rows = {(row[1], row[2]): row for row in found.rows}
    assert len(rows) == 1 + len(METHODS) * len(KEEPS)
    known = means(folder)
    mean = fmean(known["snapkv", "64", task] for task in TASKS)
    assert rows["snapkv", "64"][3] == pytest.approx(100 * mean)
    # 1024 tokens are nearer to the evaluation's 2048 than 4096; snapkv is the first method
    assert rows["snapkv", "64"][6] == pytest.approx(1024 / 2000 * (1 + 1 / 20))
    assert rows["h2o", "64"][7] > 0
    assert rows["knorm", "64"][6] is None and rows["snapkv", "512"][6] is None
    assert [panel["x"] for panel in found.panels] == [*COSTS]
    alone = frontier(*results.read_results([folder]))
    assert len(alone.panels) == 1 and alone.rows[0][6] is None


def test_seconds_of_another_model_do_not_count(tmp_path, folder):
    speed = synthetic.speed(tmp_path / "speed", METHODS, keep="64")
    record = json.loads((speed / "run.json").read_text())
    record["model"]["name"] = "another"
    (speed / "run.json").write_text(json.dumps(record))
    found = frontiers.frontier(*results.read_results([folder, speed]))
    assert all(row[6] is None for row in found.rows)
