"""Rows from a journal, by hand-written figures; published ratios."""

import pytest

from kvtrim.report import published
from kvtrim.report.format import Cells, spread
from kvtrim.report.speed import page, reasons, rows, table

LIMITS = {
    "layers_flop_per_token": 100,
    "head_flop_per_token": 40,
    "attention_flop_per_pair": 8,
    "weight_bytes": 500,
    "copy_bytes_per_s": 50,
    "matmul_flop_per_s": 1000,
}
RECORD = {
    "model": {"name": "toy", "config": None, "dtype": "float32"},
    "plan": {"repeats": 3, "new_tokens": 4},
    "machine": {"device": "an abacus", "threads": 1},
    "limits": LIMITS,
}


def line(method, number, ttft, token, length=10, batch=2, keep="4", held=100, **more):
    own = {"batch": batch, "length": length, "method": method, "keep": keep, "round": number}
    times = {"ttft_s": ttft, "token_s": token, "end_to_end_s": ttft + 4 * token}
    held = {
        "held_bytes": held,
        "full_bytes": 400,
        "entries": 4.0,
        "captured": False,
        "capture_s": 0.0,
        "median_step_s": token,
    }
    return own | times | held | {"outcome": "ok"} | more


def memory(method, keep="4", length=10, batch=2):
    own = {"batch": batch, "length": length, "method": method, "keep": keep, "round": 0}
    return own | {"outcome": "ok", "peak_bytes": 7000, "decode_peak_bytes": 300}


def plain(*times):
    return [line("transformers", n, *t, keep="", held=400) for n, t in enumerate(times, start=1)]


def test_medians_ranges_and_ratios_of_the_rounds_own():
    journal = [memory("transformers", ""), memory("snapkv"), *plain((2, 1), (4, 1), (10, 1))]
    journal += [line("snapkv", 1, 3.0, 0.5), line("snapkv", 2, 4.0, 0.25)]
    journal += [line("snapkv", 3, 5.0, 2.0)]
    row = rows(journal, LIMITS)[1]
    assert (row["ttft_s"], row["ttft_range_s"]) == (4.0, [3.0, 5.0])
    assert row["ttft_ratio"] == 1.0  # of 1.5, 1.0 and 0.5; the medians' ratio would be 1 too
    assert row["token_ratio"] == 0.5
    assert row["ms_per_token"] == 500 and row["ms_per_token_range"] == [250, 2000]
    assert row["tokens_per_s"] == 2 / 0.5  # two prompts at once
    assert row["end_to_end_s"] == 5.0 and row["rounds"] == 3
    assert (row["peak_bytes"], row["decode_peak_bytes"]) == (7000, 300)


def test_ratios_are_not_those_of_the_medians():
    journal = [*plain((1, 1), (10, 1), (2, 1))]
    journal += [line("snapkv", n, t, 1) for n, t in enumerate((4, 5, 6), start=1)]
    assert rows(journal, LIMITS)[1]["ttft_ratio"] == 3.0  # of 4, 0.5 and 3; 5 / 2 it is not


def test_floors_are_arithmetic_over_what_the_machine_does():
    row = rows(plain((2, 1)), LIMITS)[0]
    work = 2 * (10 * 100 + 55 * 8 + 40)  # a batch of two; 10 * 11 / 2 pairs
    assert row["full_prefill_floor_s"] == work / 1000
    assert row["token_floor_s"] == (500 + 400) / 50


def test_a_row_that_failed_says_why_and_others_stay():
    bad = {"batch": 2, "length": 10, "method": "adakv", "keep": "4", "round": 0}
    journal = [*plain((2, 1)), bad | {"outcome": "oom", "reason": "OutOfMemoryError: 80 GiB"}]
    made = rows(journal, LIMITS)
    assert [row["outcome"] for row in made] == ["ok", "oom"]
    assert reasons(made) == ["adakv 4, 10 tokens (batch 2): oom: OutOfMemoryError: 80 GiB"]
    cells = table(made)
    assert all(len(row) == len(cells.columns) for row in cells.rows)
    assert "oom: OutOfMemoryError" in page(RECORD, made)


def test_without_plain_transformers_there_is_no_ratio():
    bad = {"batch": 2, "length": 10, "method": "transformers", "keep": "", "round": 0}
    journal = [bad | {"outcome": "oom", "reason": "-"}, line("snapkv", 1, 3, 1)]
    row = rows(journal, LIMITS)[1]
    assert row["ttft_ratio"] is None and row["ttft_s"] == 3
    assert table([row]).rows[0][4:7] == ["3.00 s", "-", "1000.0 ms"]


def test_a_peer_takes_the_bytes_of_a_full_cache_from_plain_transformers():
    journal = [*plain((2, 1)), line("kvpress:SnapKVPress", 1, 3, 1, full_bytes=None)]
    assert rows(journal, LIMITS)[1]["full_bytes"] == 400


def test_published_ratios_are_to_the_full_cache_of_the_same_table():
    own = {
        "ttft_ratio": 0.6,
        "token_ratio": 0.5,
        "batch": 1,
        "keep": "512",
        "entries": 512.0,
        "captured": False,
        "capture_s": 0.0,
    }
    measured = [own | {"method": "fastkv", "length": length} for length in (4096, 40000)]
    lines = published.cells({"config": "llama-3.1-8b"}, measured).rows
    name = "Llama-3.1-8B-Instruct"
    first = [f"{name}, first token", "fastkv", "-", "131072", "x0.51", "40000", "512", "x0.60"]
    assert first in lines  # 14.15 s of 27.94 s
    rate = [f"{name}, tokens/s", "fastkv", "512", "32768", "x1.98", "40000", "512", "x2.00"]
    assert rate in lines  # 63.84 to 32.29 tokens per second
    assert [line[5:] for line in lines if line[1] == "headkv"] == [["-", "-", "-"]] * 8
    short = published.cells({"config": None}, measured, only_measured=True).rows
    assert {line[1] for line in short} == {"fastkv"}
    assert {line[3] for line in short} == {"8192", "32768"}
    nemo = published.cells({"config": "mistral-nemo-12b"}, measured).rows
    named = published.cells({"name": "mistralai/Mistral-Nemo-Instruct-2407"}, measured).rows
    assert nemo[0][0] == named[0][0] == "Mistral-Nemo-12B-Instruct, first token"
    assert "2502.01068" in published.section({"config": None}, measured)


def test_figures_as_people_read_them():
    assert spread(0.2613, [0.258, 12.5]) == "0.261 (0.258 to 12.5)"
    assert Cells([("a", "left"), ("b", "right")], [["x|y", "1"]]).markdown() == (
        "| a | b |\n| --- | ---: |\n| x\\|y | 1 |\n"
    )


@pytest.mark.parametrize("short", [True, False])
def test_the_batch_is_a_column_only_where_there_is_one(short):
    one = rows([line("transformers", 1, 2, 1, batch=1, keep="")], LIMITS)
    assert "batch" not in table(one, short).headings
    assert "batch" in table(rows(plain((2, 1)), LIMITS), short).headings
