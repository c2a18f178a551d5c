"""The propagation layer: curves against plain loops and masks on the untouched model."""

import json

import pytest
import torch

import kvtrim
import models
import oracles
from kvtrim.bench.calibrate import tsp
from kvtrim.bench.calibrate import tsp as prefills
from kvtrim.bench.calibrate.tsp import Plan, Point, choose, full_prefill, measure, narrowed_prefill
from kvtrim.errors import FileError, UnsupportedModelError, UsageError
from kvtrim.hf.models import fingerprint
from kvtrim.methods.propagation import TokenSelective
from kvtrim.methods.propagation import layers as shipped
from kvtrim.types import Target

SHARE, WINDOW, KERNEL = 0.4, 8, 7
SIZES = 3, 6, 2  # layers, query heads, KV heads


def stock_final(model, ids, masks=None):
    """The last token's final hidden state and logits of the untouched model."""
    states = []

    def keep(module, args, output):
        states.append(output.last_hidden_state[0, -1])

    hook = model.get_decoder().register_forward_hook(keep)
    try:
        n = ids.shape[1]
        masks = masks or {layer: oracles.causal(n) for layer in range(SIZES[0])}
        logits = oracles.run_masked(model, ids, masks)[0, -1]
    finally:
        hook.remove()
    return states[0], logits


def calls_of(model, ids):
    cache, calls = kvtrim.Cache(model, "full"), {}
    cache.session._tap = calls.__setitem__
    with torch.no_grad(), kvtrim.attach(model):
        model(ids, past_key_values=cache)
    return calls


def plain(call, count):
    """Tokens chosen at one layer, and its window's attention per token, in plain loops."""
    weights = oracles.window_weights(call.queries[0], call.keys[0], WINDOW, call.scale)
    n = weights.shape[-1]
    votes = weights.sum(1)[:, : n - WINDOW].tolist()
    half, scores = KERNEL // 2, [0.0] * (n - WINDOW)
    for head in votes:
        for slot in range(n - WINDOW):
            scores[slot] += max(head[max(0, slot - half) : slot + half + 1])
    chosen = oracles.top(scores, count - WINDOW) + list(range(n - WINDOW, n))
    return chosen, weights.mean(dim=(0, 1)).tolist()


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("tokens", [SHARE, 20])
def test_a_curve_equals_plain_loops(architecture, tokens):
    model, prompts = models.tiny(architecture), [models.prompt(n, seed=n) for n in (50, 61, 56)]
    curve = measure(model, [ids[0].tolist() for ids in prompts], tokens)
    assert [point.layer for point in curve] == [0, 1]
    expected = {layer: [] for layer in (0, 1)}
    for ids in prompts:
        n = ids.shape[1]
        count = tokens if isinstance(tokens, int) else int(n * tokens)
        looked = [plain(call, count) for call in calls_of(model, ids).values()]
        hidden, logits = stock_final(model, ids)
        for layer, rows in expected.items():
            chosen, own = looked[layer]
            above = [looked[other] for other in range(layer + 1, 3)]
            later = [sum(weights[at] for at in chosen) for _, weights in above]
            both = [len(set(chosen) & set(theirs)) / count for theirs, _ in above]
            narrow = oracles.causal(n)
            narrow[:, [at for at in range(n) if at not in chosen]] = False
            masks = {at: oracles.causal(n) if at <= layer else narrow for at in range(3)}
            got, said = stock_final(model, ids, masks)
            wanted, given = logits.softmax(-1), said.softmax(-1)
            rows.append(
                (
                    sum(own[at] for at in chosen),
                    sum(later) / len(later),
                    sum(both) / len(both),
                    float((got - hidden).norm() / hidden.norm()),
                    float((wanted * (wanted / given).log()).sum()),
                )
            )
    for layer, rows in expected.items():
        mass, later, overlap, distance, kl = zip(*rows, strict=True)
        point = curve[layer]
        for found, all_of_them in zip(
            (point.mass, point.later, point.overlap), (mass, later, overlap), strict=True
        ):
            assert found == pytest.approx(sum(all_of_them) / 3, abs=1e-4)
            assert 0 <= found <= 1
        assert point.distances == pytest.approx(list(distance), rel=1e-3)
        assert point.distance == pytest.approx(sorted(distance)[1], rel=1e-3)
        assert point.kl == pytest.approx(sorted(kl)[1], rel=1e-2)
        assert point.distance > 1e-3, "nothing was lost, so nothing was proven"


def test_the_tokens_compared_are_those_that_go_on(llama):
    ids = models.prompt(60)
    with torch.no_grad(), kvtrim.attach(llama):
        _, looked = full_prefill(llama, ids, SHARE)
        for layer in (0, 1):
            cache = kvtrim.Cache(
                llama, "fastkv", 0.2, budget="unlimited", layer=layer, tokens=SHARE
            )
            llama(ids, past_key_values=cache)
            held = [sorted({*map(tuple, heads)}) for heads in models.positions(cache)]
            assert held[2] == [tuple(looked.chosen[layer].tolist())]
            assert held[layer] == [tuple(range(60))]


def test_a_layer_overlaps_with_itself_and_everything_costs_nothing(llama):
    ids = models.prompt(60)
    with kvtrim.attach(llama):
        full, looked = full_prefill(llama, ids, SHARE)
        assert all(looked.overlap(layer, layer) == 1 for layer in range(3))
        assert looked.overlap(0, 2) < 1
        whole, all_of_it = full_prefill(llama, ids, 1.0)
        assert all(len(chosen) == 60 for chosen in all_of_it.chosen)
        assert all_of_it.mass(0, 2) == pytest.approx(1)
        for layer in (0, 1):
            same = narrowed_prefill(llama, ids, layer, 1.0)
            assert (same.distance(full), same.kl(full), whole.distance(full)) == (0, 0, 0)


def curve_of(*distances):
    return [Point(layer, 0, 0, 0, each, 0, [each]) for layer, each in enumerate(distances)]


def test_the_earliest_layer_that_is_close_enough():
    curve = curve_of(0.9, 0.6, 0.4, 0.5, 0.3, 0.1, 0.0)  # of 8 layers: the middle is 3
    choice = choose(curve)
    assert (choice.layer, choice.limit) == (2, 0.5) and "the middle layer's (3)" in choice.rule
    assert choose(curve, 0.3).layer == 4 and "tolerance" in choose(curve, 0.3).rule
    assert choose(curve, 1.0).layer == 0
    none = choose(curve_of(0.9, 0.2, 0.4), 0.1)
    assert none.layer == 1 and "none is within tolerance" in none.rule


def test_generated_prompts_follow_from_the_seed(llama):
    def made(**change):
        return tsp.prompts(llama, models.tokenizer(), Plan(prompts=2, length=440, **change))

    assert made() == made() != made(seed=1)
    assert len({tuple(ids) for ids in made()}) == 2
    assert all(380 < len(ids) <= 440 for ids in made())


def test_prompts_of_your_own_are_user_messages(llama):
    plan, tokenizer = Plan(), models.tokenizer()
    ids = tsp.prompts(llama, tokenizer, plan, ["Why is it so?", "One\nmore line"])
    said = [tokenizer.decode(own) for own in ids]
    assert said == [
        "<s><user>Why is it so?<assistant>",
        "<s><user>One\nmore line<assistant>",
    ]


@pytest.mark.parametrize(
    ("plan", "text", "message"),
    [
        (Plan(), "x" * 600, "prompt 1 has 6.. tokens, the window 512"),
        (Plan(tokens=2048), "x" * 300, "tokens=2048: all 3.. tokens of prompt 1 go on"),
        (Plan(tokens=1.0), "x" * 300, "nothing to measure"),
    ],
)
def test_prompts_that_measure_nothing_are_refused(llama, plan, text, message):
    with pytest.raises(UsageError, match=message):
        tsp.prompts(llama, models.tokenizer(), plan, [text])


def test_layers_that_slide_are_refused():
    with pytest.raises(UnsupportedModelError):
        measure(models.tiny("gemma2"), [models.prompt(40)[0].tolist()])
    with pytest.raises(UsageError, match="one of 0 to 1"):
        prefills.empty_cache(models.tiny("llama"), layer=2)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where tables are looked for."""
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path)
    shipped.measured_layers.cache_clear()
    yield tmp_path
    shipped.measured_layers.cache_clear()


def table_of(model, layer):
    plan = Plan(prompts=1, tolerance=0.0)
    distances = [0.0 if at == layer else 1.0 for at in range(2)]
    ids = [models.prompt(60)[0].tolist()]
    return tsp.table(model, models.tokenizer(), "tiny", plan, ids, curve_of(*distances))


def test_a_table_serves_exactly_the_weights_it_was_measured_on(llama, folder):
    found = table_of(llama, layer=1)
    tsp.write(folder / "tiny.json", found)
    assert [path.name for path in folder.iterdir()] == ["tiny.json"]
    assert json.loads((folder / "tiny.json").read_text()) == found
    assert kvtrim.Cache(llama, "fastkv", 24).method.propagation.layer == 1
    assert kvtrim.Cache(llama, "fastkv", 24, layer=0).method.propagation.layer == 0
    other = models.tiny("llama", seed=1)
    assert kvtrim.Cache(other, "fastkv", 24).method.propagation.layer is None
    assert kvtrim.Cache(llama, "gemfilter", 24).method.propagation.layer is None


def test_a_table_with_a_layer_that_the_model_lacks_is_refused(llama, folder):
    tsp.write(folder / "tiny.json", table_of(llama, layer=1) | {"layer": 2})
    with pytest.raises(UsageError, match=r"layer=2: .* has 3 layers, so .* one of 0 to 1"):
        TokenSelective().fitted(Target("m", 3, 6, lambda: fingerprint.identity(llama)))


def test_an_older_table_stays_until_the_new_one_is_complete(llama, folder, monkeypatch):
    path = folder / "tiny.json"
    tsp.write(path, table_of(llama, layer=1))
    before = path.read_text()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        tsp.write(path, table_of(llama, layer=0))
    assert path.read_text() == before and len(list(folder.iterdir())) == 1
    monkeypatch.undo()
    with pytest.raises(FileError, match="cannot write"):
        tsp.write(folder / "none" / "tiny.json", {})


SHIPPED = sorted(shipped.SHIPPED.glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_a_shipped_table_is_what_its_rule_finds_on_its_curve(path):
    found = json.loads(path.read_text())
    curve, record = [Point(**point) for point in found["curve"]], found["record"]
    choice = choose(curve, record["tolerance"])
    assert (found["layer"], found["limit"], found["rule"]) == (
        choice.layer,
        choice.limit,
        choice.rule,
    )
    assert [point.layer for point in curve] == list(range(found["layers"] - 1))
    assert all(len(point.distances) == record["prompts"] for point in curve)
    assert record["machine"]["dirty"] is False
    target = Target("a model", found["layers"], 9, lambda: found["identity"])
    assert TokenSelective().fitted(target).layer == found["layer"]
    other = Target("a model", found["layers"], 9, lambda: "another")
    assert TokenSelective().fitted(other).layer is None


def test_the_embedded_model_has_a_table():
    assert [path.stem for path in SHIPPED] == ["smollm2"]
