"""LaProx, CriticalKV, LAVa and CAKE: the worked examples, and plain loops beside them."""

from dataclasses import replace

import pytest
import torch

import kvtrim
from kvtrim.methods.policies import cake, laprox
from kvtrim.methods.policies import output as projections
from kvtrim.methods.policies.cake import Cake
from kvtrim.methods.policies.critical import Critical
from kvtrim.methods.policies.laprox import LaProx
from kvtrim.methods.policies.lava import Lava
from kvtrim.methods.policies.output import output_factor
from kvtrim.methods.selection import SecondStage, select
from kvtrim.types import LayerView

ATTENTION = torch.tensor([[[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]], [[0.1, 0.8, 0.1], [0.3, 0.3, 0.4]]])
VALUES = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
OUTPUT = torch.tensor([[[1.0, 0, 0], [0, 1, 0]], [[0, 1, 0], [0, 0, 2]]])


def view(keys, values, queries=None, output=None, lengths=None):
    slots = keys.shape[2]
    return LayerView(
        index=0,
        layers=1,
        keep=4,
        tokens=slots,
        queries=keys[:, :, :0] if queries is None else queries,
        keys=keys,
        values=values,
        positions=torch.arange(slots).int().expand(keys.shape[:3]),
        scale=keys.shape[-1] ** -0.5,
        output=None if output is None else lambda: output,
        factor=None if output is None else lambda: output_factor(output),
        lengths=lengths,
    )


def example(values=VALUES):
    window = torch.zeros(2, 2)  # two more slots, the window's own
    return view(torch.zeros(1, 1, 5, 2), torch.cat([values, window])[None, None], output=OUTPUT)


@pytest.fixture
def given_attention(monkeypatch):
    """The window's attention as the worked example has it."""

    def give(weights):
        for module in (laprox, cake):
            monkeypatch.setattr(module.ops, "window_attention", lambda *_, **__: weights)

    return give


@pytest.mark.parametrize(
    ("gqa", "expected"),
    [
        ("prod", [0.948683, 4.138712, 1.782187]),
        ("attn", [0.430116, 1.812457, 0.930643]),
        ("rss", [0.707107, 3.492850, 1.260952]),
        ("block", [0.707107, 3.492850, 1.445683]),
    ],
)
def test_laprox_joins_query_heads_as_in_the_worked_example(given_attention, gqa, expected):
    given_attention(ATTENTION[None])
    raw = LaProx(window=2, kernel=1, gqa=gqa, norm="none").score(example())
    torch.testing.assert_close(raw[0, 0], torch.tensor(expected), rtol=1e-5, atol=1e-5)
    shares = LaProx(window=2, kernel=1, gqa=gqa).score(example())
    torch.testing.assert_close(shares, raw / raw.sum())


def test_leaving_one_entry_out_costs_its_block_norm(given_attention):
    given_attention(ATTENTION[None])
    scores = LaProx(window=2, kernel=1, gqa="block", norm="none").score(example())[0, 0]
    whole = torch.einsum("hws,se,hem->wm", ATTENTION, VALUES, OUTPUT)
    assert float(whole.norm()) == pytest.approx(4.515529, abs=1e-5)
    for slot in range(3):
        left = ATTENTION.clone()
        left[:, :, slot] = 0
        rest = torch.einsum("hws,se,hem->wm", left, VALUES, OUTPUT)
        assert float((whole - rest).norm()) == pytest.approx(float(scores[slot]), abs=1e-5)


def test_the_product_bounds_the_error_of_every_eviction():
    draw = torch.Generator().manual_seed(1)
    queries, keys, values = (torch.randn(1, h, 12, 4, generator=draw) for h in (4, 2, 2))
    output = torch.randn(4, 4, 9, generator=draw)
    layer = view(keys, values, queries, output)
    bound = LaProx(window=3, kernel=1, norm="none").score(layer)
    exact = LaProx(window=3, kernel=1, norm="none", gqa="block").score(layer)
    assert bool((bound >= exact - 1e-6).all())


def test_the_factor_gives_the_norms_of_the_whole_product():
    draw = torch.Generator().manual_seed(2)
    values, output = torch.randn(2, 3, 7, 5, generator=draw), torch.randn(6, 5, 11, generator=draw)
    layer = view(torch.zeros(2, 3, 7, 5), values, output=output)
    got = projections.projected_norms(layer)
    plain = projections.projected_norms_l1(layer, 7)
    for row in range(2):
        for slot in range(7):
            for head in range(6):
                product = values[row, head // 2, slot] @ output[head]
                assert float(got[row, head, slot]) == pytest.approx(float(product.norm()), 1e-5)
            for head in range(3):
                sums = [
                    (values[row, head, slot] @ output[2 * head + g]).abs().sum() for g in range(2)
                ]
                expected = float(sum(sums)) / 2
                assert float(plain[row, head, slot]) == pytest.approx(expected, 1e-5)


def test_scaling_a_layers_output_changes_laprox_only_without_the_norm():
    draw = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, h, 40, 4, generator=draw) for h in (4, 2, 2))
    output = [torch.randn(8, 16, generator=draw) for _ in range(2)]
    scaled = [output[0] * 50, output[1]]

    def kept(weights, norm):
        chosen = kvtrim.select("laprox", q, k, v, keep=12, window=4, output=weights, norm=norm)
        return [[head.tolist() for head in layer] for layer in chosen]

    assert kept(output, "sum") == kept(scaled, "sum")
    assert kept(output, "none") != kept(scaled, "none")


@pytest.mark.parametrize(
    ("first", "expected"), [(4, [0, 1, 2, 3]), (2, [0, 1, 4, 5]), (0, [1, 2, 4, 5])]
)
def test_criticalkv_chooses_as_in_the_worked_example(first, expected):
    base = torch.tensor([[[0.40, 0.25, 0.15, 0.10, 0.06, 0.04]]])
    sizes = torch.tensor([0.05, 1, 0.2, 0.25, 6, 5])
    second = SecondStage(torch.tensor([[first]]), base * sizes)
    kept = select(base, torch.tensor([[4]]), 6, second=second)
    assert kept.slots[0, 0].tolist() == expected


def test_criticalkv_with_one_stage_or_equal_values_is_its_scorer():
    draw = torch.Generator().manual_seed(4)
    q, k = torch.randn(4, 60, 8, generator=draw), torch.randn(2, 60, 8, generator=draw)
    v, output = torch.ones(2, 60, 8), [torch.randn(16, 32, generator=draw)]
    plain = kvtrim.select("snapkv", q, k, v, keep=20, window=8)
    for settings in ({"first_stage": 1.0}, {"eps": 0.0}):
        wrapped = kvtrim.select(
            "criticalkv", q, k, v, keep=20, window=8, output=output, **settings
        )
        assert all(
            a.equal(b)
            for x, y in zip(plain, wrapped, strict=True)
            for a, b in zip(x, y, strict=True)
        )


def test_criticalkv_needs_a_scorer_that_takes_one_look():
    with pytest.raises(kvtrim.KvtrimError, match="wraps scorers"):
        Critical(base=Critical())


def test_lava_asks_for_the_entropy_of_its_scores():
    layer = view(torch.zeros(3, 1, 8, 2), torch.zeros(3, 1, 8, 2))
    scores = torch.zeros(3, 1, 8)
    scores[0] = 0.125
    scores[1, 0, :2] = 0.5
    scores[2, 0, :4] = torch.tensor([0.7, 0.1, 0.1, 0.1])
    expected = torch.tensor([1, 1 / 3, 0.452260], dtype=torch.float64)
    torch.testing.assert_close(Lava().preference(layer, scores), expected, rtol=1e-5, atol=1e-6)


def test_lava_doubles_a_heads_scores_with_its_values():
    draw = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, h, 30, 4, generator=draw) for h in (4, 2, 2))
    policy, louder = Lava(window=4), v.clone()
    louder[:, 1] *= 2
    before, after = policy.score(view(k, v, q)), policy.score(view(k, louder, q))
    torch.testing.assert_close(after[:, 0], before[:, 0])
    torch.testing.assert_close(after[:, 1], 2 * before[:, 1])


def test_cake_scores_and_asks_as_in_the_worked_example(given_attention):
    given_attention(torch.tensor([[[[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]]]))
    policy, layer = (
        Cake(window=2, kernel=1),
        view(torch.zeros(1, 1, 5, 2), torch.zeros(1, 1, 5, 2)),
    )
    scores = policy.score(layer)
    torch.testing.assert_close(scores[0, 0], torch.tensor([6.625, 6.625, 0.25]))
    asked = float(policy.preference(layer, scores))
    assert asked == pytest.approx(2.079442 * 0.0625, abs=1e-6)


def test_cake_refuses_a_window_without_variance():
    with pytest.raises(kvtrim.KvtrimError, match=r"window=1: expected int .2 or more"):
        Cake(window=1)


def test_cake_with_equal_layers_and_no_gamma_is_uniform_snapkv():
    draw = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(1, h, 60, 8, generator=draw).repeat(3, 1, 1, 1) for h in (4, 2, 2))
    cut = kvtrim.select("cake", q, k, v, keep=20, window=8, gamma=0.0)
    plain = kvtrim.select(
        "snapkv", q, k, v, keep=20, window=8, kernel=5, pool="avg", group_order="after"
    )
    for one, other in zip(cut, plain, strict=True):
        assert all(a.equal(b) for a, b in zip(one, other, strict=True))


def test_laprox_divides_by_what_the_layer_received_for_the_window():
    draw = torch.Generator().manual_seed(7)
    queries, keys, values = (torch.randn(2, h, 20, 4, generator=draw) for h in (4, 2, 2))
    output = torch.randn(4, 4, 9, generator=draw)
    hidden = torch.randn(2, 20, 9, generator=draw)
    layer = replace(view(keys, values, queries, output), hidden=hidden)
    raw = LaProx(window=5, norm="none").score(layer)
    got = LaProx(window=5, norm="resid").score(layer)
    for row in range(2):
        size = sum(float(x) ** 2 for token in hidden[row, -5:] for x in token) ** 0.5
        torch.testing.assert_close(got[row], raw[row] / size)
    assert LaProx(norm="resid").reads_hidden and not LaProx().reads_hidden
    assert Critical(base=LaProx(norm="resid")).reads_hidden
