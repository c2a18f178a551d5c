"""CircuitKV's walks against the whole matrix, KVFundaBench's maps against all weights."""

from math import log

import pytest
import subjects
import torch

import models
from kvtrim.bench.analyses import circuitkv, kvfundabench, passes
from kvtrim.errors import UsageError
from kvtrim.methods.policies.circuitkv import CircuitKV

POLICY = CircuitKV()


def test_charge_and_absorption_are_the_chains():
    """Every state's row spelled out, and powers of the matrix."""
    model = models.tiny()
    given = subjects.asked(model, 30)
    one = next(iter(passes.passes(given)))
    found = circuitkv.charge(given)
    for index, call in enumerate(subjects.calls_of(model, subjects.ids_of(given))):
        surface = subjects.weights_of(call, POLICY.window).amax(dim=0)
        n, window, sinks = 30, POLICY.window, POLICY.sinks
        chain = torch.zeros(n, n, dtype=torch.float64)
        pull = surface.sum(dim=0)
        for state in range(n):
            if state < sinks:
                chain[state, state] = 1
            elif state < n - window:
                for earlier in range(state):
                    chain[state, earlier] = pull[earlier] / pull[:state].sum()
            else:
                row = surface[state - (n - window)]
                chain[state] = row / row.sum()
        start = torch.zeros(2, n, dtype=torch.float64)
        start[0, -1] = 1
        start[1, sinks:] = 1 / (n - sinks)
        at, visits, ends = start, start.clone(), [start[:, :sinks].sum(-1)]
        for _ in range(POLICY.steps):
            at = at @ chain
            visits += at
            ends.append(at[:, :sinks].sum(-1))
        visits[:, :sinks] = 0
        own, absorbed = circuitkv.walk(one.view(index), POLICY)
        assert torch.allclose(own, visits) and torch.allclose(absorbed, torch.stack(ends, -1))
        shares = visits.sort(descending=True).values[:, :3].sum(-1) / visits.sum(-1)
        row = [*shares.tolist(), *ends[-1].tolist()]
        assert found.rows[index][1:] == pytest.approx(row)


def test_parts_of_a_prompt_share_its_visits():
    visits = torch.arange(20.0).double().reshape(2, 10)
    halves = circuitkv.parts_of(visits, 2)
    assert halves[0].tolist() == pytest.approx([10 / 45, 35 / 45])
    assert circuitkv.parts_of(visits, 64).shape == (2, 10)


def test_nothing_between_sinks_and_window_is_refused():
    one = next(iter(passes.passes(subjects.asked(models.tiny(), 12))))
    with pytest.raises(UsageError, match="12 tokens has none between 4 sinks and the window of 8"):
        circuitkv.walk(one.view(0), POLICY)


@pytest.mark.parametrize("at_once", [2**21, 700])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])  # which caps logits, and slides
def test_a_map_sums_all_weights(architecture, at_once, monkeypatch):
    monkeypatch.setattr(passes, "_ELEMENTS", at_once)
    model, n, bins = models.tiny(architecture), 100, 7
    given = subjects.asked(model, n)
    one = next(iter(passes.passes(given)))
    assert one.layers == ([0, 1, 2] if architecture == "llama" else [1, 2])
    call = subjects.calls_of(model, subjects.ids_of(given))[-1]
    logits = call.queries[0] @ call.keys[0].repeat_interleave(3, 0).transpose(-1, -2) * call.scale
    if call.softcap:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    weights = logits.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
    cells, figures = kvfundabench.layer_map(one.view(len(one.layers) - 1), bins)
    mean = weights.mean(dim=0)
    expected = torch.zeros(bins, bins, dtype=torch.float64)
    rows = [0] * bins
    sinks = near = entropy = 0.0
    for query in range(n):
        rows[query * bins // n] += 1
        for slot in range(query + 1):
            expected[query * bins // n, slot * bins // n] += mean[query, slot]
            sinks += float(mean[query, slot]) if slot < 4 else 0
            near += float(mean[query, slot]) if slot >= 4 and slot > query - 64 else 0
        own = -(weights[:, query, : query + 1] * weights[:, query, : query + 1].log()).sum(-1)
        entropy += float(own.mean()) / log(max(query + 1, 2))
    assert torch.allclose(cells, expected / torch.tensor(rows)[:, None])
    assert figures.tolist() == pytest.approx(
        [sinks / n, near / n, 1 - (sinks + near) / n, entropy / n]
    )
    assert cells.sum(dim=-1).tolist() == pytest.approx([1.0] * bins)


def test_each_kind_of_task_has_a_map_of_its_own():
    given = subjects.asked(models.tiny(), 60, 70)
    found = kvfundabench.heatmap(given)
    assert [panel["title"] for panel in found.panels] == ["prompt-0", "prompt-1"]
    assert [row[:3] for row in found.rows] == [["prompt-0", 1, 60.0], ["prompt-1", 1, 70.0]]
    cells = found.panels[0]["cells"]
    assert cells[0][1] is None and cells[1][0] is not None  # nothing is seen ahead
