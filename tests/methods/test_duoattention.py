"""DuoAttention and KVzip's head level: whole heads by a table, the others sinks and newest."""

import json

import pytest
import torch

import kvtrim
import loops
import models
from kvtrim.bench.calibrate.heads import Plan, kvzip_scores, measure
from kvtrim.errors import UsageError
from kvtrim.methods.budgets import WholeHeads, head_scores
from kvtrim.types import Room, Target


@pytest.fixture
def written(tmp_path):
    """Write a table of scores [L][H] and what its record says; gives its path."""

    def write(rows, **record):
        table = {f"{i}-{j}": [x] for i, row in enumerate(rows) for j, x in enumerate(row)}
        head_scores.write(tmp_path / "table.json", table, record)
        return str(tmp_path / "table.json")

    return write


def room(keep, tokens, protected, layers=2, heads=2, group=2, layer=0):
    return Room(layer, layers, heads, keep, float(keep), protected, tokens, group)


def counts(table, rooms, **settings):
    budget, scores = WholeHeads(table=table, **settings), torch.zeros(1, 2, 9)
    return [budget.counts(each, scores)[0].tolist() for each in rooms]


ROWS = [[0.1, 0.9, 0.2, 0.2], [0.5, 0.5, 0.0, 0.6]]  # KV heads: .9 .2 and .5 .6, means .5 .2 .5 .3


def test_as_many_heads_stay_whole_as_fit(written):
    """L K (keep - p) / (n - p): 4 heads, p = 10, n = 100, so 90 for a whole one."""
    table = written(ROWS)
    for keep, expected in [
        (10, [[0, 0], [0, 0]]),
        (30, [[20, 20], [20, 20]]),  # 80 entries: none is whole
        (35, [[90, 3], [3, 3]]),  # 100: one, and 10 for three
        (60, [[90, 10], [10, 90]]),  # 200: two, the best and the one with .6
        (80, [[90, 10], [90, 90]]),
        (100, [[90, 90], [90, 90]]),
    ]:
        got = counts(table, [room(keep, 100, 10, layer=layer) for layer in range(2)])
        assert got == expected, keep
    both = [room(60, 100, 10, layer=layer) for layer in range(2)]
    assert counts(table, both, group="mean") == [[90, 10], [90, 10]]
    assert counts(table, both, spread=False) == [[90, 0], [0, 90]]
    assert counts(table, both, threshold=0.7) == [[90, 36], [36, 36]]


@pytest.mark.parametrize("keep", [9, 20, 33, 47, 60])
def test_positions_are_those_of_the_loop(written, keep):
    draw = torch.Generator().manual_seed(keep)
    q, k = (torch.randn(3, h, 64, 8, generator=draw) for h in (4, 2))
    rows = torch.rand(3, 4, generator=draw, dtype=torch.float64).tolist()
    given = {"table": written(rows), "sinks": 2, "window": 6}
    kept = kvtrim.select("duoattention", q, k, k, keep=keep, **given)
    expected = loops.whole_heads(rows, 2, 64, keep, 2, 6)
    assert [[head.tolist() for head in layer] for layer in kept] == expected


def test_a_small_budget_is_half_recent_at_most():
    policy = kvtrim.METHODS["duoattention"].policy
    assert [policy.recent(keep) for keep in (6, 10, 100, 200)] == [0, 1, 46, 64]


def test_auto_takes_the_table_of_its_own_kind(monkeypatch, written, tmp_path):
    written(ROWS, identity="this model", score="kvzip")
    monkeypatch.setattr(head_scores, "shipped_tables", lambda: {"mine": tmp_path / "table.json"})
    target = Target("a model", 2, 4, lambda: "this model")
    assert WholeHeads(measure="kvzip").fitted(target).table == "mine"
    with pytest.raises(UsageError, match=r"calibrate heads .*--score reason"):
        WholeHeads().fitted(target)
    other = Target("another", 2, 4, lambda: "other weights")
    with pytest.raises(UsageError, match=r"calibrate heads .*--score kvzip"):
        WholeHeads(measure="kvzip").fitted(other)


def test_kvzips_score_of_a_head_is_the_largest_of_its_entries(llama):
    tokenizer, ids = models.tokenizer(), models.prompt(60)[0].tolist()
    with kvtrim.attach(llama):
        got = kvzip_scores(llama, tokenizer, ids)
    cache = kvtrim.Cache(llama, "kvzip", 59, tokenizer=tokenizer)
    seen = {}
    policy = type(cache.method.policy)
    score = policy.score
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), kvtrim.attach(llama):
        patch.setattr(
            policy, "score", lambda self, layer: seen.setdefault(layer.index, score(self, layer))
        )
        llama(torch.tensor([ids]), past_key_values=cache)
    group = got.shape[1] // 2
    for layer, scores in seen.items():
        for head in range(got.shape[1]):
            finite = [x for x in scores[0, head // group].tolist() if x != float("inf")]
            assert float(got[layer, head]) == pytest.approx(max(finite), rel=1e-5)


def test_a_table_of_kvzips_scores_is_measured_without_answers(llama, tmp_path):
    plan = Plan(score="kvzip", prompts=2, lengths=(400,))
    measured = measure(llama, models.tokenizer(), plan)
    assert measured.counted == 2 and measured.misled == 0
    assert all(len(scores) == 2 and max(scores) <= 1 for scores in measured.table.values())
    (tmp_path / "t.json").write_text(json.dumps(measured.table))
    cache = kvtrim.Cache(llama, "kvzip-head", 40, table=str(tmp_path / "t.json"))
    with torch.no_grad(), kvtrim.attach(llama):
        llama(models.prompt(100), past_key_values=cache)
    held = torch.stack(cache.entries()).flatten().tolist()
    assert held.count(100) == len(held) * 36 // 96 and sum(held) <= 40 * len(held)
