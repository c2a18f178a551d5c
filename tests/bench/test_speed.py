"""Measuring speed on tiny models: turns, resuming, rows that fail, batches, peers. No seconds."""

import json
import sys
from unittest.mock import Mock

import pytest
import torch

import models
from kvtrim import records
from kvtrim.bench import candidates as bench
from kvtrim.bench.candidates import Candidate, candidates
from kvtrim.bench.speed import peer_kvpress, roofline
from kvtrim.bench.speed.clock import Plan, measure, turns
from kvtrim.errors import BudgetError, UnknownNameError, UsageError
from kvtrim.methods import request
from kvtrim.records import journal
from kvtrim.records.journal import Journal
from kvtrim.report.speed import rows
from models import is_attached

PLAN = Plan((48, 80), new_tokens=3, repeats=2)


@pytest.fixture(scope="module")
def model():
    return models.tiny("llama", dtype=torch.float32)


def measured(model, chosen, plan=PLAN, into=None):
    into = Journal() if into is None else into
    measure(model, plan, chosen, into)
    return {(row["method"], row["keep"], row["length"], row["batch"]): row for row in table(into)}


def table(into):
    return rows(into.lines, {})


def keys(lines):
    names = ("round", "batch", "length", "method", "keep")
    return [tuple(line[name] for name in names) for line in lines]


def test_methods_take_turns_there_and_back():
    chosen = candidates(["snapkv", "full"], ["40"])
    order = [(t.round, t.length, t.candidate.method) for t in turns(PLAN, chosen)]
    assert order[:3] == [(0, 48, "transformers"), (0, 48, "snapkv"), (0, 48, "full")]
    assert order[6:9] == [(1, 48, "full"), (1, 48, "snapkv"), (1, 48, "transformers")]
    assert order[12:15] == [(2, 48, "transformers"), (2, 48, "snapkv"), (2, 48, "full")]


def test_every_figure_is_there(model):
    found = measured(model, candidates(["full", "snapkv"], ["40"]))
    assert len(found) == 6 and not is_attached(model)
    plain, own = found["transformers", "", 80, 1], found["snapkv", "40", 80, 1]
    assert plain["ttft_ratio"] == plain["token_ratio"] == plain["end_to_end_ratio"] == 1
    assert (plain["entries"], own["entries"]) == (80, 40)
    assert plain["held_bytes"] == plain["full_bytes"] == own["full_bytes"]
    assert own["held_bytes"] < 0.6 * own["full_bytes"]
    assert own["tokens_per_s"] == pytest.approx(1 / own["token_s"])
    assert own["end_to_end_s"] > own["ttft_s"] and own["rounds"] == 2
    if sys.platform == "linux":
        assert own["peak_bytes"] is not None and own["decode_peak_bytes"] is not None


def test_batches_hold_and_make_more(model):
    plan = Plan((48,), batches=(1, 3), new_tokens=2, repeats=1)
    found = measured(model, candidates(["snapkv"], ["40"]), plan)
    one, three = (found["snapkv", "40", 48, batch] for batch in (1, 3))
    assert three["held_bytes"] == 3 * one["held_bytes"] and three["entries"] == one["entries"]
    assert three["tokens_per_s"] == pytest.approx(3 / three["token_s"])


def test_a_prompt_read_in_chunks_is_cut_once(model):
    plan = Plan((80,), new_tokens=2, repeats=1, prefill_chunk=32)
    row = measured(model, candidates(["snapkv"], ["40"]), plan)["snapkv", "40", 80, 1]
    assert row["entries"] == 40


def test_a_killed_run_goes_on_where_it_stopped(model, tmp_path):
    chosen = candidates(["snapkv", "full"], ["40"])
    whole = Journal()
    measure(model, PLAN, chosen, whole)
    record, done = {"plan": 1}, 0

    def killed(what):
        nonlocal done
        done += 1
        if done == 9:
            raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        journal.open_run(tmp_path / "run", record) as (first, _),
    ):
        measure(model, PLAN, chosen, first, killed)
    path = tmp_path / "run" / records.SPEED
    with path.open("a") as file:
        file.write('{"round": 1, "bat')  # what a power cut leaves
    told = []
    with journal.open_run(tmp_path / "run", record) as (again, _):
        assert again.lines == first.lines and len(again.lines) == 7
        measure(model, PLAN, chosen, again, told.append)
    assert told[0] == "warming up" and len(told) == 1 + 18 - 7
    assert keys(again.lines) == keys(whole.lines)
    assert again.lines[:7] == first.lines
    assert [json.loads(line) for line in path.read_text().splitlines()] == again.lines
    measure(model, PLAN, chosen, again, told.append)  # nothing is left, not even a warm-up
    assert len(told) == 12


def test_another_run_is_refused_and_another_day_is_not(tmp_path):
    record = {"machine": {"threads": 1, "date": "Monday", "commit": "a"}, "plan": {"repeats": 3}}
    folder = tmp_path / "run"
    journal.begin(folder, record)
    later = {**record, "machine": {**record["machine"], "date": "Tuesday", "commit": "b"}}
    with journal.open_run(folder, later) as (there, known):
        assert known == record
        there.add({"method": "knorm", "outcome": "ok"})
    other = {"machine": {"threads": 2}, "plan": {"repeats": 5}}
    with pytest.raises(UsageError, match="threads: 1 there, 2 here") as refused:
        journal.begin(folder, other)
    assert "plan.repeats: 3 there, 5 here" in str(refused.value) and "--out" in str(refused.value)
    (folder / records.RECORD).unlink()
    (folder / records.SPEED).touch()
    with pytest.raises(UsageError, match=r"without run\.json"):
        journal.begin(folder, record)


class Hungry(Candidate):
    """Runs out of memory above 48 tokens."""

    def open(self, model, length, chunk, capture=True):
        if length > 48:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")
        return super().open(model, length, chunk)


class Broken(Candidate):
    def open(self, model, length, chunk, capture=True):
        raise RuntimeError("a bug")


def test_a_row_without_memory_is_written_down_and_the_run_goes_on(model):
    into = Journal()
    chosen = [*candidates(["full"], ["40"]), Hungry("snapkv", "40")]
    found = measured(model, chosen, into=into)
    assert found["snapkv", "40", 48, 1]["outcome"] == "ok"
    row = found["snapkv", "40", 80, 1]
    assert row["outcome"] == "oom" and "80 GiB" in row["reason"] and "ttft_s" not in row
    assert found["full", "", 80, 1]["rounds"] == 2
    assert sum(line["outcome"] == "oom" for line in into.lines) == 1  # it is not tried again


def test_a_budget_out_of_reach_is_written_down_with_its_reason(model):
    found = measured(model, candidates(["pyramidinfer", "snapkv"], ["34"]))
    assert found["pyramidinfer", "34", 80, 1]["outcome"] == "refused"
    assert "out of reach" in found["pyramidinfer", "34", 80, 1]["reason"]
    assert found["snapkv", "34", 80, 1]["outcome"] == "ok"
    assert not is_attached(model)


def test_a_bug_is_not_hidden_but_a_peers_is_its_own(model):
    plan = Plan((48,), new_tokens=1, repeats=1)
    with pytest.raises(RuntimeError, match="a bug"):
        measure(model, plan, [Broken("snapkv", "40")], Journal())
    row = measured(model, [Broken("x", "40", peer="x")], plan)["x", "40", 48, 1]
    assert (row["outcome"], row["reason"]) == ("failed", "RuntimeError: a bug")


def test_a_method_is_settled_once_for_each_candidate(monkeypatch):
    counted = Mock(side_effect=bench.find)
    monkeypatch.setattr(bench, "find", counted)
    monkeypatch.setattr(request, "find", counted)
    _, *cells = candidates(["snapkv"], ["40", "5"], {"window": "8"})
    assert counted.call_count == 1 + len(cells)
    own, small = cells
    assert own.request.method is own.at(1.0).method is own.settled
    assert (own.request.name, str(own.request.keep), own.request.settings) == (
        "snapkv", "40", {"window": "8"}
    )  # fmt: skip
    with pytest.raises(BudgetError, match="keep=5 leaves nothing"):
        _ = small.request
    assert counted.call_count == 1 + len(cells)


def test_parameters_go_to_the_methods_that_have_them():
    chosen = candidates(["full", "snapkv", "streaming-llm"], ["40"], {"kernel": "5", "sinks": "2"})
    assert [c.settings for c in chosen] == [
        {}, {}, {"kernel": "5", "sinks": "2"}, {"sinks": "2"}
    ]  # fmt: skip
    with pytest.raises(UnknownNameError, match="did you mean 'kernel'"):
        candidates(["full", "snapkv"], ["40"], {"kernl": "5"})
    with pytest.raises(UnknownNameError):
        candidates(["full"], ["40"], {"kernel": "5"})
    with pytest.raises(BudgetError):
        candidates(["snapkv"], ["150%"])


def test_limits_count_what_the_model_does(model):
    found = roofline.of_model(model)
    layer = 2 * 48 * 48 + 2 * 48 * 16 + 3 * 48 * 64  # q and o, k and v, MLP
    assert found["layers_flop_per_token"] == 2 * 3 * layer
    assert found["head_flop_per_token"] == 2 * 300 * 48
    assert found["attention_flop_per_pair"] == 4 * 3 * 6 * 8
    norms = 7 * 48
    assert found["weight_bytes"] == 4 * (3 * layer + 300 * 48 + norms)


FAKE = '''
"""A stand-in for kvpress with its interface: it keeps the last tokens. Not the real package."""
from contextlib import contextmanager
from kvtrim.hf.base import cache_in


class SnapKVPress:
    def __init__(self, compression_ratio):
        self.ratio = compression_ratio

    @contextmanager
    def __call__(self, model):
        def cut(module, args, kwargs, output):
            layer = cache_in(kwargs).layers[module.layer_idx]
            kept = int(layer.keys.shape[2] * (1 - self.ratio))
            layer.keys, layer.values = layer.keys[:, :, -kept:], layer.values[:, :, -kept:]

        hooks = [
            layer.self_attn.register_forward_hook(cut, with_kwargs=True)
            for layer in model.model.layers
        ]
        yield
        for hook in hooks:
            hook.remove()
'''


@pytest.fixture
def kvpress(tmp_path, monkeypatch):
    """Write a module of that name where Python finds it."""

    def written(text):
        (tmp_path / "kvpress.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "kvpress", raising=False)

    yield written
    sys.modules.pop("kvpress", None)


def test_a_peer_is_measured_at_the_same_budget(model, kvpress):
    kvpress(FAKE)
    peer_kvpress.require()
    chosen = [*candidates(["snapkv"], ["40", "25%"]), *peer_kvpress.candidates(["snapkv"], ["40"])]
    chosen += peer_kvpress.candidates(["h2o"], ["25%"])
    found = measured(model, chosen)
    for keep, entries in (("40", 40), ("25%", 20)):
        row = found["kvpress:SnapKVPress", keep, 80, 1]
        assert row["entries"] == entries
        assert row["full_bytes"] == found["transformers", "", 80, 1]["full_bytes"]


def test_a_peer_that_does_not_fit_costs_its_rows_alone(model, kvpress):
    kvpress("raise ImportError('cannot import name QuantizedCache from transformers')")
    chosen = [
        *candidates(["snapkv"], ["40"]),
        *peer_kvpress.candidates(["snapkv"], ["40", "1MiB"]),
    ]
    found = measured(model, chosen)
    row = found["kvpress:SnapKVPress", "40", 80, 1]
    assert row["outcome"] == "failed" and "QuantizedCache" in row["reason"]
    assert found["kvpress:SnapKVPress", "1MiB", 80, 1]["outcome"] == "refused"
    assert found["snapkv", "40", 80, 1]["outcome"] == "ok"


def test_a_peer_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(peer_kvpress, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install kvpress"):
        peer_kvpress.require()
