"""HeadKV: the recorded cases, the worked numbers, and what a table must be."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file

import golden
import kvtrim
import models
from kvtrim.errors import UsageError
from kvtrim.methods.budgets import HeadTable
from kvtrim.methods.budgets.head_table import dealt_again
from kvtrim.methods.settings import find
from kvtrim.types import Room
from small import small


@pytest.fixture
def written(tmp_path):
    """Write a table of mean scores [L][H] in the authors' format; gives its path."""

    def write(rows, name="table.json"):
        table = {f"{i}-{j}": [x, x] for i, row in enumerate(rows) for j, x in enumerate(row)}
        path = tmp_path / name
        path.write_text(json.dumps(table))
        return str(path)

    return write


def room(keep, tokens, layers, heads, group=1, window=8, layer=0):
    return Room(layer, layers, heads, keep, float(keep), window, tokens, group)


def caps(table, keep, heads, group=1, tokens=100_000, **settings):
    rows = HeadTable(table=table, **settings).caps(room(keep, tokens, 1, heads, group))
    return rows[0].tolist()


@pytest.fixture(params=golden.cases("headkv"), ids=lambda case: case.id)
def case(request):
    return request.param


def golden_settings(case, tmp_path):
    params = case.params
    samples = load_file(golden.FOLDER / "headkv.safetensors")["table/samples"].tolist()
    table = {f"{i}-{j}": s for i, layer in enumerate(samples) for j, s in enumerate(layer)}
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table))
    settings = {"table": str(path), "window_inside": params["variant"] != "kvf"}
    settings |= {name: params[name] for name in ("beta", "temp", "window", "kernel", "rows")}
    settings["pool"] = params["pooling"]
    settings["granularity"] = "query" if params["granularity"] == "query_head" else "kv"
    return settings


def test_it_keeps_what_the_reference_kept(case, tmp_path):
    kept = kvtrim.select(
        "headkv", *case.qkv(), keep=case.params["capacity"], **golden_settings(case, tmp_path)
    )
    wrong = {i: case.differing_heads(layer, f"l{i}/") for i, layer in enumerate(kept)}
    assert not any(wrong.values()), wrong
    assert [[len(head) for head in layer] for layer in kept] == case.tensor(
        "head_budgets"
    ).tolist()


def test_its_caps_are_those_of_the_reference(case, tmp_path):
    chosen = find("headkv", **golden_settings(case, tmp_path))
    wanted = case.tensor("head_caps").tolist()
    heads = len(wanted[0])
    asked = room(
        case.params["capacity"], 200, len(wanted), heads, 8 // heads, case.params["window"]
    )
    assert chosen.budget.caps(asked).tolist() == wanted


@pytest.mark.parametrize(
    ("scores", "keep", "beta", "expected"),
    [
        ([8, 1, 1, 0], 512, 1.2, [1428, 252, 252, 84]),
        ([0.5, 0.3, 0.2, 0], 128, 1.01, [238, 144, 96, 2]),
        ([3, 3, 3, 3], 128, 1.01, [120] * 4),
        ([3, 3, 3, 3], 512, 5.0, [504] * 4),
    ],
)
def test_worked_caps(written, scores, keep, beta, expected):
    got = caps(written([scores]), keep, heads=4, beta=beta)
    assert got == expected
    assert sum(got) == pytest.approx(4 * (keep - 8), rel=3e-4)


def test_the_floor_and_pool_of_the_published_tables(written):
    """beta 1.2, window 8: keep 512 gives floor 84 and per 420, keep 2048 gives floor 340."""
    one_head = written([[1, 0, 0, 0]])
    assert caps(one_head, 512, 4) == [4 * 420 + 84, 84, 84, 84]
    assert caps(one_head, 2048, 4)[1:] == [340] * 3


def test_the_mean_over_the_model_is_the_budget(written):
    draw = random.Random(3)
    rows = [[draw.random() ** 4 for _ in range(8)] for _ in range(16)]
    for settings in ({}, {"beta": 1.01}, {"beta": 5.0, "temp": 0.5}):
        budget = HeadTable(table=written(rows), **settings)
        query = budget.caps(room(128, 100_000, 16, 8))
        shared = budget.caps(room(128, 100_000, 16, 2, group=4))
        assert (query.double().mean() + 8).item() == pytest.approx(128, rel=5e-4)
        assert shared.double().mean().item() == pytest.approx(query.double().mean(), abs=0.5)


def test_a_kv_head_gets_the_mean_of_its_query_heads_rounded_half_to_even(written):
    rows = [[8, 1, 1, 0], [2, 2, 3, 3]]
    budget = HeadTable(table=written(rows))
    query = budget.caps(room(512, 100_000, 2, 4)).tolist()
    shared = budget.caps(room(512, 100_000, 2, 2, group=2)).tolist()
    assert shared == [[round((a + b) / 2), round((c + d) / 2)] for a, b, c, d in query]


def test_what_a_head_cannot_use_is_lost_or_dealt_again(written):
    table = written([[8, 1, 1, 0]])
    lost = HeadTable(table=table).counts(room(512, 1008, 1, 4), torch.zeros(1, 4, 1000))
    assert lost.tolist() == [[1000, 252, 252, 84]]
    again = HeadTable(table=table, redistribute=True)
    given = again.counts(room(512, 1008, 1, 4), torch.zeros(1, 4, 1000))
    assert given.tolist() == [[1000, 466, 466, 84]]
    assert int(given.sum()) == 4 * 504


@pytest.mark.parametrize("seed", range(20))
def test_dealing_again_spends_the_budget_as_a_plain_loop_does(seed):
    draw = random.Random(seed)
    weights = [draw.choice([0, 0, 1, 2, 30]) for _ in range(8)]
    start = [draw.randrange(0, 300) for _ in range(8)]
    most = draw.randrange(40, 200)
    got = dealt_again(
        torch.tensor(start).double().view(2, 4), torch.tensor(weights).double().view(2, 4), most
    )
    plain = [float(x) for x in start]
    while max(plain) > most:
        excess = sum(max(0, x - most) for x in plain)
        plain = [min(x, most) for x in plain]
        share = [w if x < most else 0 for x, w in zip(plain, weights, strict=True)]
        if not sum(share):
            share = [1 if x < most else 0 for x in plain]
        if not sum(share):
            break
        plain = [x + excess * s / sum(share) for x, s in zip(plain, share, strict=True)]
    assert got.flatten().tolist() == [round(x) for x in plain]
    assert float(got.sum()) == pytest.approx(min(sum(start), 8 * most), abs=4)


def test_a_short_prompt_is_kept_whole_in_every_head(written):
    table = written([[8, 1, 1, 0]])
    q = torch.randn(4, 60, 8)
    kept = kvtrim.select("headkv", q, q, q, keep=60, table=table)
    assert [len(head) for head in kept[0]] == [60] * 4


def test_kvf_stores_the_window_on_top(written):
    table, q = written([[1, 1]]), torch.randn(2, 200, 8)
    for preset, stored in (("upstream", 64), ("kvf", 72), ("kvf-kv", 72), ("fastkv-v1", 64)):
        kept = kvtrim.select("headkv", q, q, q, keep=64, preset=preset, table=table)
        assert [len(head) for head in kept[0]] == [stored] * 2


def test_keys_may_come_in_any_order(tmp_path, written):
    rows = [[1, 2, 3, 4], [5, 6, 7, 8]]
    in_order = HeadTable(table=written(rows)).caps(room(64, 1000, 2, 4))
    table = json.loads((tmp_path / "table.json").read_text())
    shuffled = tmp_path / "shuffled.json"
    shuffled.write_text(json.dumps(dict(sorted(table.items(), reverse=True))))
    assert torch.equal(HeadTable(table=str(shuffled)).caps(room(64, 1000, 2, 4)), in_order)


def test_a_table_that_changed_on_disk_is_read_again(written):
    table = written([[8, 1, 1, 0]])
    before = caps(table, 512, 4)
    assert caps(written([[0, 1, 1, 800]]), 512, 4) != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected one object"),
        ("{}", "expected one object"),
        ('{"a": [1]}', "a key is \"layer-head\", not 'a'"),
        ('{"0-0": [1], "0-2": [1]}', "missing 0-1"),
        ('{"0-0": [1], "00-0": [1]}', "need 1 keys, 2 are there"),
        ('{"0-0": []}', "0-0 needs a list of numbers"),
        ('{"0-0": 0.5}', "0-0 needs a list of numbers"),
        ('{"0-0": [-1]}', "0-0 needs a list of numbers"),
        ('{"0-0": [NaN]}', "0-0 needs a list of numbers"),
        ('{"0-0": [0], "0-1": [0]}', "no head has a score above 0"),
    ],
)
def test_a_broken_table_is_refused_before_anything_runs(tmp_path, text, message):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UsageError) as error:
        find("headkv", table=str(tmp_path / "bad.json"))
    assert message in str(error.value)


def test_a_table_must_exist_and_be_a_file(tmp_path):
    with pytest.raises(UsageError, match="no head table 'none': neither a file nor one that"):
        find("headkv", table="none")
    with pytest.raises(UsageError, match="neither a file"):
        find("headkv", table=str(tmp_path))
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot read the head table"):
        find("headkv", table=str(tmp_path / "binary.json"))


def test_a_model_without_a_table_is_told_how_to_make_one(llama):
    with pytest.raises(UsageError) as error:
        kvtrim.Cache(llama, "headkv", 64)
    assert "this llama model (3 layers of 6 query heads)" in str(error.value)
    assert "kvtrim calibrate heads --model MODEL --out FILE" in str(error.value)
    q = torch.randn(2, 64, 8)
    with pytest.raises(UsageError, match="the given queries"):
        kvtrim.select("headkv", q, q, q, keep=32)
    with pytest.raises(UsageError, match="no table of head scores was given"):
        HeadTable().caps(room(64, 1000, 1, 4))


@pytest.mark.parametrize("shape", [(4, 6), (2, 6), (3, 2), (3, 12)])
def test_a_table_of_another_shape_is_refused_before_anything_is_read(llama, shape):
    table = small("headkv", *shape)["table"]
    with pytest.raises(UsageError) as error:
        kvtrim.Cache(llama, "headkv", 64, table=table)
    layers, heads = shape
    assert f"has {layers} layers of {heads} query heads" in str(error.value)
    assert "has 3 of 6" in str(error.value)


def test_layers_that_slide_are_not_in_the_table():
    model = models.tiny("gemma3_text")  # 3 layers, 2 of them managed
    cache = kvtrim.Cache(model, "headkv", 24, **small("headkv", layers=2))
    with torch.no_grad(), kvtrim.attach(model):
        model(models.prompt(48), past_key_values=cache)
    assert len({tuple(counts[0].tolist()) for counts in cache.entries()}) > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.5}, "beta=0.5: expected float .1 or more"),
        ({"temp": 0.0}, "temp=0.0: expected float .above 0"),
    ],
)
def test_parameters_out_of_range_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        HeadTable(**settings)


def test_a_random_table_fits_any_model_and_deals_out_the_whole_budget():
    caps = HeadTable(table="random").caps(room(512, 100_000, 4, 8, 2))
    assert caps.shape == (4, 8) and len(set(caps.flatten().tolist())) > 16
    assert abs(float(caps.float().mean()) - 504) <= 2
    again = HeadTable(table="random").caps(room(512, 100_000, 4, 8, 2))
    assert torch.equal(caps, again)
