"""Tables of an evaluation, from folders with made-up figures."""

import json

import numpy
import pytest

from kvtrim.errors import FileError, UsageError
from kvtrim.report import evaluation as tables_of
from kvtrim.report import families, figures_data, published_scores, results, statistics
from kvtrim.report.document import chapters
from kvtrim.report.lookup import FULL, View, budget
from kvtrim.report.tables import percent, score
from report.synthetic import evaluation, grid, longbench, ruler

TASKS = [longbench("qasper"), longbench("multifieldqa_en"), longbench("trec"), ruler("vt")]


@pytest.fixture
def folder(tmp_path):
    return evaluation(tmp_path / "run", TASKS, ["snapkv", "h2o"], ["128", "512"], limit=4)


def view_of(*places):
    (section,), _ = results.read_results(places)
    return View(section)


def tables(view):
    return {table.name.rpartition("/")[2]: table for table in tables_of.all_tables(view)}


def rows_of(table):
    return [dict(zip(table.cells.headings, row, strict=True)) for row in table.cells.rows]


def edited(path, change):
    """A .jsonl file with every row changed; rows that become None are gone."""
    rows = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row is not None))


def scored(folder, value):
    """Give every line the score `value(row)`."""
    edited(folder / "scores.jsonl", lambda row: row | {"score": value(row)})


def test_longbench_has_sixteen_columns_and_says_over_how_many_the_average_is(folder):
    scored(folder, lambda row: {"qasper": 0.2, "trec": 0.6}.get(row["task"][10:], 0.4))
    made = rows_of(tables(view_of(folder))["longbench"])
    names = [name for name in made[0] if name in families.LONGBENCH_TASKS]
    assert names == list(families.LONGBENCH_TASKS)
    assert [(row["method"], row["keep"]) for row in made] == [
        ("full", "all"),
        ("snapkv", "128"),
        ("h2o", "128"),
        ("snapkv", "512"),
        ("h2o", "512"),
    ]
    assert made[0]["qasper"] == "20.0 (20.0 to 20.0)" and made[0]["lcc"] == "-"
    assert made[0]["average"].startswith("40.0") and made[0]["over"] == "3 of 16"


def test_categories_are_means_of_their_measured_tasks(folder):
    scored(folder, lambda row: {"qasper": 0.2, "trec": 0.6}.get(row["task"][10:], 0.4))
    row = rows_of(tables(view_of(folder))["longbench-categories"])[0]
    assert row["single_doc_qa"] == "30.0 (30.0 to 30.0) n=2/3" and row["code"] == "-"
    assert row["average of categories"] == "45.0 (45.0 to 45.0) over 2 of 6"


def test_the_average_of_categories_has_the_interval_of_its_samples(folder):
    scored(folder, lambda row: int(row["sample"]) / 4 if row["task"] == TASKS[0] else 0.5)
    view = view_of(folder)
    values = [view.values(task, FULL) for task in TASKS[:3]]
    found = statistics.mean_of_groups([values[:2], values[2:]])
    assert found.value == pytest.approx((0.375 / 2 + 0.5 / 2 + 0.5) / 2)
    own = statistics.mean_of_means(values[:1])
    assert (found.high - found.low) == pytest.approx((own.high - own.low) / 4, rel=0.1)
    row = rows_of(tables(view)["longbench-categories"])[0]
    assert row["average of categories"] == f"{score(found)} over 2 of 6"


def test_held_counts_every_task_once_however_many_samples_it_has(tmp_path):
    few, many = longbench("qasper"), longbench("trec")
    place = evaluation(tmp_path / "a", [(few, [{}]), (many, [{}] * 9)], ["snapkv"], ["128"])
    held = {few: 2**20, many: 3 * 2**20}
    edited(
        place / "samples.jsonl",
        lambda row: row | {"held_bytes": held[row["task"]], "full_bytes": 4 * 2**20},
    )
    row = rows_of(tables(view_of(place))["overview"])[1]
    assert (row["held"], row["of full"]) == ("2.0 MiB", "50.0%")


def test_a_divergence_of_exactly_0_is_named_where_the_axis_has_no_place_for_it(folder):
    def value(row):
        return row | ({"kl": 0.0} if row["method"] == "h2o" and row["keep"] == "512" else {})

    edited(folder / "samples.jsonl", value)
    (kl,) = (p for p in figures_data.all_pictures(view_of(folder)) if p["name"].endswith("/kl"))
    assert "exactly 0 and below the axis at 512: h2o" in kl["title"]
    assert {one["method"]: len(one["points"]) for one in kl["series"]} == {"snapkv": 2, "h2o": 1}


def test_change_is_relative_to_the_full_cache_on_the_same_samples(folder):
    def value(row):
        if row["task"] != ruler("vt"):
            return 0.5
        full = {"0": 1.0, "1": 0.5, "2": 0.5, "3": 0.0}[row["sample"]]
        return full if row["method"] == "full" else full / 2

    scored(folder, value)
    edited(  # the sample that only the full cache has does not count
        folder / "samples.jsonl",
        lambda row: None if row["method"] == "h2o" and row["sample"] == "0" else row,
    )
    made = rows_of(tables(view_of(folder))["change"])
    assert {row["RULER"].split(" ")[0] for row in made} == {"-50.0%"}
    assert made[0]["LongBench"] == "+0.0% (+0.0% to +0.0%)"
    ruled = rows_of(tables(view_of(folder))["ruler"])
    assert "n=3/4" in ruled[2]["vt"] and "n=" not in ruled[1]["vt"]


def test_where_the_full_cache_scores_nothing_there_is_no_change(folder):
    scored(folder, lambda row: 0.0)
    assert {row["RULER"] for row in rows_of(tables(view_of(folder))["change"])} == {"-"}


def test_loss_is_counted_from_the_full_cache_and_held_is_measured(folder):
    def value(row):
        full = row["method"] == "full"
        own = {"loss": 1.0 if full else 1.25, "kl": None if full else 0.125}
        return row | own | {"held_bytes": 2**20 if full else 2**18, "full_bytes": 2**20}

    edited(folder / "samples.jsonl", value)
    first, second, *_ = rows_of(tables(view_of(folder))["fidelity"])
    assert (first["held"], first["of full"], first["KL to full"]) == ("1.0 MiB", "100.0%", "-")
    assert second["of full"] == "25.0%"
    assert second["loss above full"] == "0.250 (0.250 to 0.250)"
    assert second["KL to full"] == "0.125 (0.125 to 0.125)"


def test_every_table_says_under_which_protocol_it_was_measured(tmp_path):
    for protocol in ("question-agnostic", "question-aware"):
        evaluation(tmp_path / protocol, TASKS, ["snapkv"], ["128"], protocol=protocol)
    sections, _ = results.read_results([tmp_path])
    assert len(sections) == 2
    for section in sections:
        for table in tables_of.all_tables(View(section)):
            assert table.about.startswith(section.protocol.capitalize())
            assert f"/{section.protocol}/" in table.name


def test_needles_of_all_lengths_make_one_heat_map(tmp_path):
    for length in (1024, 2048):
        tasks = [("niah", grid((length,), (0, 50, 100), 2)), *TASKS[: length == 2048]]
        evaluation(tmp_path / f"{length}", tasks, ["snapkv"], ["128"], length=length, seed=length)
    sections, speeds = results.read_results([tmp_path])
    made = chapters(sections, speeds)
    assert [chapter.title.partition(", ")[2] for chapter in made] == [
        "question-agnostic, prompts of up to 2048 tokens",
        "question-agnostic, needles at all lengths",
    ]
    (picture,) = (one for one in made[1].pictures if one["kind"] == "heat")
    assert (picture["xs"], picture["ys"]) == ([1024, 2048], [0, 50, 100])
    assert [panel["title"].partition(":")[0] for panel in picture["panels"]] == ["full", "snapkv"]
    cells = [cell for panel in picture["panels"] for row in panel["cells"] for cell in row]
    assert len(cells) == 12 and None not in cells
    names = [table.name for table in made[1].tables]
    assert "smollm2/question-agnostic/all-lengths/niah" in names
    by_length = next(table for table in made[1].tables if table.name.endswith("/niah"))
    assert by_length.cells.headings[4:] == ["1,024", "2,048", "all"]


def test_gsm8k_stands_by_shots_and_everything_else_in_a_table_of_its_own(tmp_path):
    tasks = ["gsm8k-8", "gsm8k-0", "gsm8k-50", "mmlu-5", "longgenbench"]
    found = tables(view_of(evaluation(tmp_path / "a", tasks, ["h2o"], ["64"])))
    assert found["gsm8k"].cells.headings[3:] == ["0 shots", "8 shots", "50 shots"]
    assert found["tasks"].cells.headings[3:5] == ["mmlu-5", "longgenbench"]


def test_what_was_refused_is_listed_with_its_reason(folder):
    def value(row):
        if row["method"] == "h2o" and row["keep"] == "128" and row["task"] == ruler("vt"):
            return (
                row
                | {"outcome": "refused", "reason": "too small"}
                | dict.fromkeys(("held_bytes", "full_bytes", "entries", "loss", "kl"))
            )
        return row

    edited(folder / "samples.jsonl", value)
    edited(
        folder / "scores.jsonl",
        lambda row: (
            row
            | ({"score": None} if row["task"] == TASKS[0] else {})
            | ({"outcome": "needs --allow-code-execution"} if row["task"] == TASKS[0] else {})
        ),
    )
    rows = rows_of(tables(view_of(folder))["not-measured"])
    assert rows[0]["reason"] == "needs --allow-code-execution"
    said = [row for row in rows if row["outcome"] == "refused"]
    assert [(row["task"], row["method"], row["keep"], row["samples"]) for row in said] == [
        (ruler("vt"), "h2o", "128", "4")
    ]


def test_several_folders_are_joined_and_settings_kept_apart(tmp_path):
    one = evaluation(tmp_path / "one", TASKS, ["snapkv"], ["128"])
    settings = {"window": 16}
    two = evaluation(tmp_path / "two", TASKS, ["snapkv"], ["128"], settings=settings)
    assert view_of(one, two).rows == [FULL, ("snapkv", "128"), ("snapkv:window=16", "128")]
    assert view_of(tmp_path).rows == view_of(one, two).rows  # a sweep's folder


def test_runs_with_other_prompts_are_not_joined(tmp_path):
    folders = [evaluation(tmp_path / n, TASKS[:1], [m], ["128"]) for n, m in ("ah", "bk")]
    for folder, prompt in zip(folders, ("ab" * 32, "cd" * 32), strict=True):
        path = folder / "inputs.jsonl"
        lines = [json.loads(line) | {"sha256": prompt} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UsageError, match="have different prompts of sample 0"):
        view_of(*folders)


def test_folders_that_disagree_about_a_sample_are_not_joined(tmp_path):
    one = evaluation(tmp_path / "one", TASKS, ["snapkv"], ["128"])
    two = evaluation(tmp_path / "two", TASKS, ["snapkv"], ["128"])
    scored(two, lambda row: 0.123)
    with pytest.raises(UsageError, match="disagree about full"):
        results.read_results([one, two])


def test_a_line_that_was_cut_off_does_not_count_and_a_broken_one_is_named(folder):
    path = folder / "samples.jsonl"
    whole = len(results.read_results([folder])[0][0].lines)
    path.write_text(path.read_text()[:-20])
    assert len(results.read_results([folder])[0][0].lines) == whole - 1
    path.write_text("{]\n" + path.read_text())
    with pytest.raises(FileError, match=r"samples\.jsonl:1: this is not JSON.*remove it"):
        results.read_results([folder])


def test_answers_may_hold_any_character(folder):
    odd = "a\u2028b\x85c\x0bd"
    edited(folder / "samples.jsonl", lambda row: row)
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(row | {"answer": odd}, ensure_ascii=False) + "\n" for row in rows)
    (folder / "samples.jsonl").write_text(text, encoding="utf-8")
    assert {line.answer for line in results.read_results([folder])[0][0].lines} == {odd}


@pytest.mark.parametrize("inside", ["nothing", "record"])
def test_a_folder_without_results_is_refused(tmp_path, inside):
    if inside == "record":
        (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UsageError, match=r"holds no results|nothing was measured"):
        results.read_results([tmp_path])


LLAMA = {"model": "meta-llama/Llama-3.1-8B-Instruct", "protocol": "question-aware"}
FASTKV, KVF = "snapkv:preset=fastkv-v1", "snapkv:preset=kvf"


def test_published_figures_stand_beside_ours_where_everything_matches(tmp_path):
    tasks = [*map(longbench, families.LONGBENCH_TASKS[:3]), "gsm8k-1", "mmlu-5", "csqa-0"]
    place = evaluation(tmp_path / "a", tasks, [FASTKV, KVF], ["512", "10%", "77"], **LLAMA)
    rows = rows_of(tables(view_of(place))["published"])
    own = [row for row in rows if row["keep"] == "512"]
    (line,) = (row for row in own if row["task"] == "longbench-qasper")
    assert (line["published"], line["method"]) == ("41.62", FASTKV)
    assert "arXiv 2502.01068" in line["source"] and "Table" in line["source"]
    assert {row["keep"] for row in rows} == {"all", "512", "10%"}
    assert any(row["task"] == "gsm8k-1" and "1 shots" in row["source"] for row in rows)
    shares = {row["method"] for row in rows if row["keep"] == "10%"}
    assert any(row["task"] == "mmlu-5" for row in rows) and shares == {KVF}
    assert not any(row["task"] == "csqa-0" for row in rows)  # theirs has four shots
    other = evaluation(tmp_path / "b", tasks, [FASTKV], ["512"])
    assert "published" not in tables(view_of(other))


def compare(folder, tasks, change=lambda place: None, methods=(FASTKV, KVF), **how):
    """The rows beside which published figures stand."""
    place = evaluation(folder, tasks, [*methods], ["512", "10%", "70%"], **LLAMA | how)
    change(place)
    table = tables(view_of(place)).get("published")
    return rows_of(table) if table else []


def tasks_compared(*given, **how):
    return {row["task"] for row in compare(*given, **how)}


def recorded(**changed):
    """A change of what a run's record says."""

    def change(place):
        record = json.loads((place / "run.json").read_text()) | changed
        (place / "run.json").write_text(json.dumps(record))

    return change


def test_published_figures_need_the_same_number_of_examples(tmp_path):
    zero = ["humaneval", "jailbreakv", "mmlu", "gsm8k-0", "longbench-trec"]
    assert tasks_compared(tmp_path / "zero", zero) == {"longbench-trec"}
    eight = ["humaneval-8", "jailbreakv-8", "mmlu-5", "gsm8k-8"]
    assert tasks_compared(tmp_path / "eight", eight) == {"humaneval-8", "mmlu-5", "gsm8k-8"}


def test_published_ruler_is_of_one_length_and_agnostic(tmp_path):
    tasks, how = [ruler("niah_single_1")], {"protocol": "question-agnostic"}
    assert tasks_compared(tmp_path / "short", tasks, length=4096, **how) == set()
    assert tasks_compared(tmp_path / "none", tasks, length=None, **how) == set()
    assert tasks_compared(tmp_path / "same", tasks, length=16384, **how) == {*tasks}
    assert tasks_compared(tmp_path / "aware", tasks, length=16384) == set()


@pytest.mark.parametrize(
    ("method", "settings"),
    [("snapkv", None), ("snapkv", {"window": 512}), (KVF + ",window=16", None), (FASTKV, None)],
)
def test_published_figures_are_of_the_papers_settings_alone(tmp_path, method, settings):
    rows = compare(tmp_path / "a", ["gsm8k-8"], methods=[method], settings=settings)
    assert {row["method"] for row in rows} == {"full"}


def test_what_decides_a_prompt_is_the_papers(tmp_path):
    tasks = [longbench("qasper")]
    chatted = compare(tmp_path / "no", tasks, recorded(chat=False))
    assert {row["source"].partition(",")[0] for row in chatted} == {"CircuitKV"}
    assert compare(tmp_path / "yes", tasks, recorded(chat=True)) == []
    same = compare(tmp_path / "same", tasks, recorded(truncate_at=127500))
    assert any("FastKV" in row["source"] for row in same)
    other = compare(tmp_path / "other", tasks, recorded(truncate_at=4000))
    assert not any("FastKV" in row["source"] for row in other)
    longer = compare(tmp_path / "longer", tasks, recorded(raised=tasks))
    assert longer == []


def test_what_was_left_out_or_shortened_is_not_compared_and_cuts_are_marked(tmp_path):
    tasks = [longbench("trec"), longbench("qasper"), "gsm8k-8"]

    def truncate(place):
        def change(row):
            return row | {"truncated": row["task"] == tasks[0] and row["sample"] == "1"}

        edited(place / "inputs.jsonl", change)

    def shorten(place):
        record = json.loads((place / "run.json").read_text())
        for name, most in zip(tasks, (8, 9, 8), strict=True):
            record["tasks"][name]["max_new_tokens"] = most
        (place / "run.json").write_text(json.dumps(record | {"max_new_tokens": 8}))

    assert tasks_compared(tmp_path / "short", tasks, shorten) == {tasks[0], tasks[2]}
    assert tasks_compared(tmp_path / "whole", tasks) == {*tasks}
    cut = compare(tmp_path / "cut", tasks, truncate)
    marked = {row["task"] for row in cut if row["ours"].endswith("1 of 12 prompts cut")}
    assert {row["task"] for row in cut} == {*tasks} and marked == {tasks[0]}
    assert tasks_compared(tmp_path / "left", tasks, recorded(fitting=True)) == set()


@pytest.mark.parametrize(("tokens", "ends"), [(2000, None), (127500, ""), (127490, "")])
def test_prompts_cut_as_the_paper_cuts_are_its_own_and_others_are_not(tmp_path, tokens, ends):
    tasks = [longbench("trec"), longbench("qasper")]

    def cut(place):
        recorded(truncate_at=127500)(place)
        own = {tasks[0]}
        edited(place / "inputs.jsonl", lambda row: row | {"truncated": row["task"] in own})
        edited(place / "samples.jsonl", lambda row: row | {"prompt_tokens": tokens})

    found = compare(tmp_path / "a", tasks, cut)
    assert ({row["task"] for row in found} == {*tasks}) == (ends is not None)
    assert all(not row["ours"].endswith("cut") for row in found)
    view = view_of(tmp_path / "a")
    told = published_scores.task_differences(view)
    said = f"prompts cut by --length or the window: {tasks[0]} (12 of 12)"
    assert (said in told) == (ends is None)


def test_published_figures_are_those_of_the_sources():
    found = published_scores.printed_scores()
    assert len(found) > 3000
    wanted = {"model": "Llama-3.1-8B-Instruct", "task": "gsm8k", "shots": 1, "method": "full"}
    (one,) = (p for p in found if wanted.items() <= vars(p).items())
    assert one.value == 71.49 and not one.doubtful and "2502.01941" in one.source
    assert any(p.doubtful for p in found) and {p.kind for p in found} == {
        "full",
        "tokens",
        "share",
    }
    assert all(0 <= p.value <= 100 for p in found)
    assert {p.method for p in found} >= {"adakv", "curdkv", "circuitkv", "shotkv", "key+random"}


def test_tasks_of_one_sample_are_drawn_themselves():
    draw, covered = numpy.random.default_rng(0), 0
    for _ in range(200):
        tasks = [[value] for value in draw.normal(0.5, 0.2, size=9)]
        found = statistics.mean_of_means([*tasks, [0.5, 0.5]])
        covered += found.low <= 0.5 <= found.high
        alone = statistics.mean_of_means(tasks[:3])
        assert alone.low is None and alone.value == pytest.approx(numpy.mean(tasks[:3]))
    assert 165 <= covered < 200  # 95 % at best: few tasks give narrow intervals
    pairs = [[(0.5 * task[0], task[0])] for task in tasks]
    found = statistics.change(pairs)
    assert found.low == pytest.approx(-0.5) and found.high == pytest.approx(-0.5)
    assert statistics.mean_of_groups([tasks[:2], tasks[2:]]).low is None


def test_averages_over_tasks_have_intervals_that_cover():
    draw, hits = numpy.random.default_rng(1), 0
    for _ in range(200):
        tasks = [draw.normal(mean, 1, 30) for mean in (0.0, 1.0, 2.0)]
        found = statistics.mean_of_means(tasks)
        assert found.value == pytest.approx(numpy.mean([task.mean() for task in tasks]))
        hits += found.low <= 1.0 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_a_paired_change_is_surer_than_two_means():
    draw = numpy.random.default_rng(2)
    full = draw.uniform(0.2, 1, 40)
    found = statistics.change([list(zip(full * 0.9, full, strict=True))])
    assert found.value == pytest.approx(-0.1) and found.high - found.low < 1e-9
    assert statistics.change([]) is None and statistics.mean_of_means([]) is None


def test_figures_as_people_read_them():
    assert score(statistics.Figure(0.4123, 0.35, 0.471, 9)) == "41.2 (35.0 to 47.1)"
    assert score(statistics.Figure(1.0, None, None, 1)) == "100.0 (one sample)"
    assert score(None) == "-"
    assert percent(statistics.Figure(-0.00001, -0.2, 0.05, 9)) == "+0.0% (-20.0% to +5.0%)"


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("512", ("tokens", 512)),
        ("25%", ("share", 0.25)),
        ("0.5", ("share", 0.5)),
        ("", ("full", 1)),
        ("64MiB", ("bytes", 2**26)),
        ("67108864B", ("bytes", 2**26)),
        ("1.5 KiB", ("bytes", 1536)),
        ("0.5B", ("bytes", 0.5)),
        ("1/4", ("share", 0.25)),
        ("0.3333333333333333", ("share", 1 / 3)),
        ("as much as there is", ("bytes", 0)),
    ],
)
def test_budgets_are_read_as_kvtrim_writes_them(text, wanted):
    assert budget(text) == wanted


@pytest.mark.parametrize("task", [*families.LONGBENCH_TASKS])
def test_tasks_are_known_by_their_names(task):
    assert families.longbench(longbench(task)) == task == families.longbench(task)
    assert families.ruler(longbench(task)) is None


def test_the_tasks_of_kvtrim_are_known():
    from kvtrim.tasks import GROUPS

    assert [families.longbench(name) for name in GROUPS["longbench"]] == [
        *families.LONGBENCH_TASKS
    ]
    assert {families.ruler(name) for name in GROUPS["ruler"]} == set(families.RULER_TASKS)


def test_all_pictures_have_points_that_can_be_drawn(folder):
    for picture in figures_data.all_pictures(view_of(folder)):
        assert picture["name"].startswith("smollm2/question-agnostic/2048/")
        for one in picture.get("series", ()):
            assert all(low <= y <= high for _, y, low, high in one["points"])
