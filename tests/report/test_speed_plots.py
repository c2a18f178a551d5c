"""Plots are made, one set per batch; without matplotlib the message says what to install."""

import sys

import pytest

from kvtrim.errors import UsageError
from kvtrim.report.plots import speed

TITLE = "a model, on a machine with a long name, medians of three rounds " * 2


def row(method, keep, length, batch=1, peak=2**21):
    seconds = length / 1000
    own = {"method": method, "keep": keep, "length": length, "batch": batch, "entries": 64}
    times = {"ttft_s": seconds, "ttft_range_s": [0.9 * seconds, 1.2 * seconds], "token_s": 0.01}
    times |= {"ms_per_token": 10.0, "ms_per_token_range": [9.0, 12.0]}
    return own | times | {"peak_bytes": peak, "decode_peak_bytes": peak}


def test_three_plots_for_each_batch(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row("transformers", "", n) for n in (512, 4096)]
    rows += [row("snapkv", k, n, b) for k in ("64", "128") for n in (512, 4096) for b in (1, 4)]
    rows += [{"method": "adakv", "keep": "64", "length": 512, "batch": 1, "outcome": "oom"}]
    made = speed.speed(rows, tmp_path, TITLE)
    names = ["ttft", "token", "memory", "ttft-batch4", "token-batch4", "memory-batch4"]
    assert made == [tmp_path / f"{name}.png" for name in names]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)


def test_what_was_not_measured_has_no_plot(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row("snapkv", "64", 512, peak=None)]
    assert [path.name for path in speed.speed(rows, tmp_path, "a model")] == [
        "ttft.png",
        "token.png",
    ]


def test_without_matplotlib_the_message_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'kvtrim\[plot\]'"):
        speed.speed([row("snapkv", "64", 512)], tmp_path, "a model")
