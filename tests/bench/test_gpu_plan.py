"""The plan for a GPU, on a CPU: every stage runs, and its page holds every table."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvtrim.bench.speed import agenda
from kvtrim.report import gpu
from processes import fork

PLAN = Path(__file__).parents[2] / "experiments" / "gpu.py"
STAGES = ("check", "tokens", "decode", "serve", "prefill", "probe", "kernels", "batch")


def begin(command, log=os.devnull, env=None):
    """The plan's script as its command line says, in a fork of this process."""
    python, script, *rest = map(str, command)
    assert (python, script) == (sys.executable, str(PLAN))

    def run():
        runpy.run_path(script, run_name="__main__")

    return fork(run, script, *rest, log=log, **env or {})


@pytest.mark.process
def test_a_dry_run_goes_through_every_stage(tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed (pip install 'kvtrim[triton]')")
    import kvtrim.hf.models.load  # noqa: F401 here, once for both processes

    monkeypatch.syspath_prepend(PLAN.parent)
    out, log = tmp_path / "out", tmp_path / "log"

    def measuring(command, env):  # what it prints is what the watcher prints
        process = begin(command, log, env)
        sys.stdout.write(process.stdout.read())
        return process

    monkeypatch.setattr(agenda, "subprocess", SimpleNamespace(Popen=measuring))
    command = ["--dry-run", "--minutes", "10", "--out", out, "--commit", "abc"]
    done = begin([sys.executable, PLAN, *command], log)
    said = done.stdout.read()
    assert done.wait() == 0, said[-3000:] + log.read_text()[-3000:]
    lines = [json.loads(line) for line in (out / agenda.LINES).read_text().splitlines()]
    assert {x["stage"] for x in lines if x["outcome"] == "ok"} == set(STAGES)
    assert not gpu.failures(lines) and "left to a further run" not in said
    assert all(x["machine"]["commit"] == "abc" and x["machine"]["packages"] for x in lines)
    prefill = {x["method"] for x in gpu.figures(lines, "prefill")}
    assert prefill >= {"transformers", "full", "fastkv", "gemfilter", "headkv", "laprox"}
    decode = {(x["rows"], x["subject"]): x for x in gpu.figures(lines, "decode")}
    same = {
        x["held_bytes"]
        for (rows, name), x in decode.items()
        if rows == 2 and name != "transformers"
    }
    assert len(decode) == 10 and len(same) == 1  # equal bytes, however they are spread
    served = {x["captured"]: x for x in gpu.figures(lines, "serve")}
    assert [served[each]["same"] for each in (False, True)] == [5, 5]
    page = (out / "summary.md").read_text()
    assert all(f"## {title}" in page for title in gpu._TABLES)
    assert len(list(out.iterdir())) <= 8


@pytest.mark.process
def test_whoever_only_watches_starts_without_torch():
    run = [sys.executable, "-X", "importtime", str(PLAN), "--help"]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert "--dry-run" in done.stdout and "agenda" in done.stderr
    assert "| torch" not in done.stderr


def line(stage, name, outcome="ok", **figures):
    machine = {"device": "NVIDIA H100", "python": "3.12", "commit": "abcdef", "packages": {}}
    own = {"figures": figures} if outcome == "ok" else {"reason": figures["reason"]}
    return {"stage": stage, "name": name, "outcome": outcome, "machine": machine} | own


def step(held, subject, seconds, share, rows=1):
    own = {"rows": rows, "held": held, "subject": subject, "median_step_s": seconds}
    own |= {"held_bytes": 2**27, "of_bandwidth": share, "capture_s": 0.3}
    return line("decode", f"{subject} {rows} x {held}", **own)


def first(method, length, seconds):
    own = {"method": method, "length": length, "ttft_s": seconds, "keep": "2048"}
    return line("prefill", f"{method} {length}", **own, peak_bytes=None, held_bytes=2**20)


def test_the_page_says_which_targets_were_reached():
    lines = [
        step(1024, "captured", 5.0e-3, 0.9),
        step(1024, "captured per-head", 5.5e-3, 0.82),
        *(first("full", 32_768, x) for x in (2.0, 2.2, 9.0)),
        first("fastkv", 32_768, 1.1),
        first("snapkv", 32_768, 2.3),
    ]
    found = {row[0]: row[1:] for row in gpu.targets(lines)}
    assert found["share of copy bandwidth, 1024 held, batch 1"] == [
        "at least 0.85",
        "0.900",
        "reached",
    ]
    assert found["per-head to alike, 1024 held, batch 1"] == ["at most 1.05", "1.100", "missed"]
    assert found["first token, full / fastkv, 32768"] == ["at least 1.88", "2.000", "reached"]
    assert found["first token, snapkv / full, 32768"] == ["at most 1.02", "1.045", "missed"]
    page = gpu.page(lines)
    assert "| 32768 | fastkv | 2048 | 1.10 s | 1 | - | x0.50 | - | 1.0 MiB |" in page
    assert "NVIDIA H100; Python 3.12" in page


def test_the_page_names_what_failed_unless_it_was_measured_later():
    bad = line("batch", "full", "failed", reason="OutOfMemoryError: 3 GiB")
    page = gpu.page([bad, line("decode", "x", "skipped", reason="137 GB of entries")])
    assert "- batch: full: OutOfMemoryError: 3 GiB" in page
    assert "- decode: x: 137 GB of entries" in page
    own = {"tokens": 9, "batch": 12, "tokens_per_s": 3.0, "used_bytes": 1, "memory": 2}
    assert not gpu.failures([bad, line("batch", "full", **own)])
