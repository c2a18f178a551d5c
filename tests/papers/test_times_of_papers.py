"""Times of FastKV's tables: what it prints, and when a published ratio stands below ours."""

import json

import pytest
import torch

from kvtrim.bench.provenance import provenance
from kvtrim.papers import recipe as known
from kvtrim.report import papers, results
from report.synthetic import speed

LENGTHS = [8192, 16384, 32768, 65536, 131072]
LLAMA, NEMO = "meta-llama/Llama-3.1-8B-Instruct", "mistralai/Mistral-Nemo-Instruct-2407"


def ran(
    place,
    item="table-5",
    model=LLAMA,
    config=None,
    device="NVIDIA H200",
    kind=None,
    steps=1,
    **changed,
):
    """The folder of a run of an item with made-up seconds."""
    one = known.find(f"fastkv/{item}")
    labels = changed.pop("methods", list(one.methods.values()))
    folder = speed(place, labels, changed.pop("lengths", LENGTHS), changed.pop("keep", "512"))
    record = json.loads((folder / "run.json").read_text())
    record["model"] |= {"name": model, "config": config}
    record["plan"]["new_tokens"] = steps
    record["machine"] |= {"device": device} | ({"device_type": kind} if kind else {})
    (folder / "run.json").write_text(json.dumps(record))
    return one, folder


def drawn(one, folder):
    found = papers.draw(one, *results.read_results([folder]))
    assert len(found) == 2, "the paper's table, then everything measured"
    shaped = found[0].table
    rows = {(keep, method, whose): cells for keep, method, whose, *cells in shaped.cells.rows}
    return [heading for heading, _ in shaped.cells.columns], rows, found[0].differences


def test_what_the_tables_print_is_at_hand():
    llama, nemo = papers.tables_in_print(known.find("fastkv/table-5"))
    assert [heading for heading, _ in llama.cells.columns][2:] == [f"{n} tokens" for n in LENGTHS]
    rows = {(keep, method): cells for keep, method, *cells in llama.cells.rows}
    assert rows["all", "full"] == ["0.64 s", "1.41 s", "3.40 s", "9.05 s", "27.94 s"]
    assert rows["-", "fastkv"][-1] == "14.15 s" and "hardware" in llama.about
    assert ["-", "gemfilter", "0.69 s"] in [list(row[:3]) for row in nemo.cells.rows]
    (first, _) = papers.tables_in_print(known.find("fastkv/table-7"))
    assert first.cells.columns[-1][0] == "length not given"
    assert ["512", "fastkv", "63.84 /s"] in [list(row) for row in first.cells.rows]
    (rates, _) = papers.tables_in_print(known.find("fastkv/table-6"))
    assert [list(row) for row in rates.cells.rows] == [
        ["all", "full", "51.55 /s", "43.07 /s", "32.29 /s", "21.24 /s", "12.60 /s"]
    ]


@pytest.mark.parametrize(
    ("model", "config", "ratio"),
    [
        (LLAMA, None, "x0.51"),  # 14.15 s of 27.94 s
        (NEMO, None, "x0.51"),  # 19.22 s of 37.94 s
        ("llama-3.1-8b (random weights)", "llama-3.1-8b", "x0.51"),
        ("mistral-nemo-12b (random weights)", "mistral-nemo-12b", "x0.51"),
    ],
)
def test_a_published_ratio_stands_below_ours_on_the_papers_model(tmp_path, model, config, ratio):
    headings, rows, told = drawn(*ran(tmp_path / "a", model=model, config=config))
    assert headings == ["keep", "method", "whose", *(f"{n} tokens" for n in LENGTHS)]
    assert rows["512", "fastkv", "published"][-1] == ratio
    # made up: 131072 / 2000 s, and 5 % more for each place in the list
    assert rows["all", "transformers", "ours"][-1] == "65.54 s, x1.00"
    assert rows["512", "fastkv", "ours"][-1] == "85.20 s, x1.30"
    assert not any(line.startswith(("the model", "nothing published")) for line in told)
    assert any("NVIDIA H200 here, not named there" in line for line in told)
    assert any("random ones" in line for line in told) == (config is not None)


def test_the_tables_of_a_model_are_its_own(tmp_path):
    first = drawn(*ran(tmp_path / "a"))[1]["512", "snapkv", "published"]
    other = drawn(*ran(tmp_path / "b", model=NEMO))[1]["512", "snapkv", "published"]
    assert first[0] == "x1.05" and other[0] == "x1.03"  # 0.67 of 0.64 s, 0.95 of 0.92 s


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"model": "smollm2"}, "another model"),
        (
            {"model": "llama-3.1-8b (random weights, 2 layers)", "config": "llama-3.1-8b"},
            "another",
        ),
        ({"device": "Intel(R) Xeon(R) Processor"}, "no GPU by its record, and the paper's times"),
        ({"device": "AMD Ryzen 7 5700G with Radeon Graphics"}, "no GPU by its record"),
        ({"device": "A100-SXM4-40GB"}, "no GPU by its record"),  # of which no type was kept
        ({"kind": "cpu"}, "no GPU by its record"),
        ({"item": "table-7", "lengths": [131072]}, "another number of decoding steps"),
        ({"item": "table-7", "lengths": [131072], "steps": 127}, "names no length of prompts"),
        ({"item": "table-6", "steps": 127, "methods": ["full"]}, "ratios are to the full cache"),
    ],
)
def test_elsewhere_nothing_published_stands_and_why_is_said(tmp_path, changed, why):
    _, rows, told = drawn(*ran(tmp_path / "a", **changed))
    assert {whose for _, _, whose in rows} == {"ours"}
    (line,) = [line for line in told if line.startswith("nothing published stands beside: ")]
    assert why in line


def test_a_device_whose_record_calls_it_cuda_is_a_gpu_under_any_name(tmp_path):
    _, rows, _ = drawn(*ran(tmp_path / "a", device="A100-SXM4-40GB", kind="cuda"))
    assert rows["512", "fastkv", "published"][-1] == "x0.51"
    assert provenance(torch.device("cpu"))["device_type"] == "cpu"


def test_a_table_without_a_budget_has_those_of_its_recipe_alone(tmp_path):
    _, rows, told = drawn(*ran(tmp_path / "a", keep="16384"))  # nothing is evicted at 8192
    assert {whose for _, _, whose in rows} == {"ours"}
    assert "not measured: keep 512" in told


def test_lengths_and_methods_that_are_not_the_papers_stand_alone(tmp_path):
    labels = ["fastkv:preset=v1", "fastkv"]
    _, rows, told = drawn(*ran(tmp_path / "a", lengths=[8192, 10000], methods=labels))
    assert rows["512", "fastkv", "published"] == ["x0.64", "-"]  # 0.41 of 0.64 s
    assert "lengths: 8192, 10000 here, 8192, 16384, 32768, 65536, 131072 there" in told
    assert "not measured: snapkv" in told and "not the paper's: fastkv" in told
    assert "not measured: fastkv" not in told


def test_budgets_that_were_not_measured_are_said(tmp_path):
    one, folder = ran(tmp_path / "a", item="table-7", lengths=[131072], steps=127, keep="1024")
    _, rows, told = drawn(one, folder)
    assert ("1024", "adakv", "ours") in rows
    assert {"not measured: keep 512", "not measured: keep 2048"} <= {*told}


def test_a_run_that_was_cut_off_or_refused_something_says_so(tmp_path):
    one, folder = ran(tmp_path / "a", lengths=[8192])
    lines = [json.loads(line) for line in (folder / "speed.jsonl").read_text().splitlines()]
    bad = {"outcome": "refused", "reason": "there is no table"}
    kept = []
    for line in lines:
        if line["method"] == one.methods["headkv"]:
            kept += [line | bad] if not line["round"] else []
        elif line["method"] != one.methods["fastkv"] or not line["round"]:
            kept.append(line)
    (folder / "speed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    _, rows, told = drawn(one, folder)
    assert rows["512", "fastkv", "ours"] == ["not yet"]
    assert rows["512", "headkv", "ours"] == ["refused"]
    assert "cut off: 1 of 7 rows are not timed yet; run it again" in told
    (line,) = [line for line in told if "there is no table" in line]
    assert line.startswith("headkv:preset=fastkv-v1 512, 8192 tokens (batch 1): refused")
    (_, whole) = papers.draw(one, *results.read_results([folder]))
    assert "not yet" in {row[3] for row in whole.table.cells.rows} and "ok" not in {
        cell for row in whole.table.cells.rows for cell in row
    }
