"""CurDKV's analyses against loops that evict for real."""

import pytest
import subjects
import torch

import models
import oracles
from kvtrim.bench.analyses import curdkv, passes
from kvtrim.bench.candidates import Candidate
from kvtrim.errors import UsageError

WINDOW = subjects.WINDOW


def first_pass(given):
    return next(iter(passes.passes(given)))


def test_the_loss_of_a_token_is_that_of_evicting_it():
    model = models.tiny()
    given = subjects.asked(model, 30)
    one = first_pass(given)
    for index, call in enumerate(subjects.calls_of(model, subjects.ids_of(given))):
        attention, lost = curdkv.eviction_losses(one.view(index), WINDOW)
        q, k, v = call.queries[0], call.keys[0], call.values[0]
        n, groups = k.shape[1], q.shape[0] // k.shape[0]
        weights = subjects.weights_of(call, WINDOW)
        for head in range(k.shape[0]):
            for token in (0, 5, n - WINDOW - 1):
                total = 0.0
                for query in range(head * groups, (head + 1) * groups):
                    for row in range(WINDOW):
                        seen = range(n - WINDOW + row + 1)
                        left = [slot for slot in seen if slot != token]
                        at = n - WINDOW + row
                        logits = [q[query, at] @ k[head, slot] * call.scale for slot in left]
                        again = torch.stack(logits).softmax(0) @ v[head, left]
                        whole = weights[query, row, : len(seen)] @ v[head, list(seen)]
                        total += float((whole - again).square().sum())
                assert float(lost[head, token]) == pytest.approx(total**0.5, rel=1e-6)
                mean = weights[head * groups : (head + 1) * groups, :, token].mean()
                assert float(attention[head, token]) == pytest.approx(float(mean), rel=1e-6)
    found = curdkv.loss(given)
    assert len(found.rows) == 3 and all(-1 <= x <= 1 for row in found.rows for x in row[1:4])


def test_rank_correlations_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    draw = torch.Generator().manual_seed(3)
    one, other = torch.randint(0, 9, (2, 4, 50), generator=draw).double()  # many equals
    for row, value in enumerate(passes.spearman(one, other).tolist()):
        assert value == pytest.approx(stats.spearmanr(one[row], other[row]).statistic)
    assert passes.spearman(torch.ones(1, 5), torch.arange(5.0)[None]).tolist() == [0]


def test_a_window_that_leaves_nothing_is_refused():
    one = first_pass(subjects.asked(models.tiny(), 30))
    with pytest.raises(UsageError, match="--window 29 leaves no tokens of 30"):
        curdkv.eviction_losses(one.view(0), 29)


@pytest.mark.parametrize("at_once", [2**21, 500])
def test_what_a_choice_rebuilds(at_once, monkeypatch):
    monkeypatch.setattr(passes, "_ELEMENTS", at_once)  # as one block, and in many
    model = models.tiny()
    given = subjects.asked(model, 30)
    one = first_pass(given)
    draw = torch.Generator().manual_seed(1)
    for index, call in enumerate(subjects.calls_of(model, subjects.ids_of(given))):
        mask = torch.rand(2, 30, generator=draw) < 0.4
        mask[:, 0] = True
        found = curdkv.reconstruction_losses(one.view(index), {"own": mask})["own"]
        q, k, v = call.queries[0], call.keys[0], call.values[0]
        losses = []
        for head in range(6):
            group = head // 3
            logits = q[head] @ k[group].T * call.scale
            seen = oracles.causal(30)
            missing = logits.masked_fill(~seen | mask[group], 0).norm()
            inside = logits.masked_fill(~seen, 0).norm()
            whole = logits.masked_fill(~seen, -torch.inf).softmax(-1) @ v[group]
            part = logits.masked_fill(~seen | ~mask[group], -torch.inf).softmax(-1) @ v[group]
            losses.append([float(missing / inside), float((whole - part).norm() / whole.norm())])
        assert found == pytest.approx(torch.tensor(losses).mean(dim=0).tolist(), rel=1e-5)


def test_choices_by_keys_values_and_both_beside_other_methods():
    given = subjects.asked(
        models.tiny(),
        40,
        keeps=("50%", "25%"),
        cells=(
            Candidate("snapkv", "50%", {"window": 4}),
            Candidate("snapkv", "25%", {"window": 4}),
        ),
    )
    found = curdkv.reconstruction(given)
    assert [row[:2] for row in found.rows] == [
        [keep, name]
        for keep in ("50%", "25%")
        for name in ("key", "value", "key x value", "snapkv:window=4")
    ]
    assert [row[2] for row in found.rows] == pytest.approx([0.5] * 4 + [0.25] * 4)
    by_name = {(row[0], row[1]): row[3:] for row in found.rows}
    for name in ("key", "value", "key x value", "snapkv:window=4"):
        assert by_name["50%", name][0] < by_name["25%", name][0] < 1


def test_leverage_is_the_diagonal_of_the_projection():
    model = models.tiny()
    given = subjects.asked(model, 40)
    one = first_pass(given)
    found = curdkv.leverage(given)
    for index, call in enumerate(subjects.calls_of(model, subjects.ids_of(given))):
        tops, ranks = [], []
        for rows in (call.keys[0], call.values[0]):
            own = torch.stack([(x @ torch.linalg.inv(x.T @ x) @ x.T).diagonal() for x in rows])
            tops.append(own / own.sum(dim=-1, keepdim=True))
            for x in rows:
                squares = torch.linalg.eigvalsh(x.T @ x).flip(0).tolist()
                sums = [sum(squares[: c + 1]) for c in range(len(squares))]
                ranks.append(next(c + 1 for c, s in enumerate(sums) if s >= 0.9 * sums[-1]))
        product = tops[0] * tops[1]
        tops.append(product / product.sum(dim=-1, keepdim=True))
        expected = [float(own.sort(descending=True).values[:, :4].sum(-1).mean()) for own in tops]
        row = found.rows[index]
        assert row[1:3] == [sum(ranks[:2]) / 2, sum(ranks[2:]) / 2]
        assert row[3:] == pytest.approx(expected, rel=1e-4)
        sides = curdkv._sides(one, index)
        assert torch.allclose(sides["keys"].double(), tops[0], rtol=1e-3)
