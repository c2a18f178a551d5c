"""Parameters by name, from Python and from text."""

import json

import pytest
import torch

import kvtrim
from kvtrim.bench.candidates import candidates
from kvtrim.errors import UnknownNameError, UsageError
from kvtrim.methods.budgets import PerHead, Pyramid
from kvtrim.methods.method import Method
from kvtrim.methods.policies.knorm import KNorm
from kvtrim.methods.schedule import Schedule
from kvtrim.methods.settings import find, parameters, spell_out, split
from kvtrim.methods.unit import Chunk
from kvtrim.methods.variant import Variant

MINE = Method(KNorm(window=3))


def test_a_parameter_is_found_in_its_part():
    chosen = find("adakv", window=16, floor=0.5, every=4, skip_layers=(0, 1))
    assert chosen.policy.window == 16
    assert chosen.budget.floor == 0.5
    assert chosen.schedule == Schedule(every=4)
    assert chosen.skip_layers == (0, 1)
    assert kvtrim.METHODS["adakv"].policy.window == 32, "the registry never changes"


def test_text_becomes_the_parameters_type():
    chosen = find(
        "adakv", window="16", floor="0.5", normalize="true", skip_layers="0,2", every="none"
    )
    assert (chosen.policy.window, chosen.budget.floor, chosen.budget.normalize) == (16, 0.5, True)
    assert chosen.skip_layers == (0, 2)
    assert chosen.schedule.every is None


def test_whole_parts_are_replaced_by_name_and_composed():
    chosen = find(
        "knorm", budget="per-head", layers="pyramid", schedule="every-8", unit="chunk", chunk=5
    )
    assert chosen.budget == PerHead(layers=Pyramid())
    assert chosen.schedule == Schedule(every=8)
    assert chosen.unit == Chunk(chunk=5)
    assert find("adakv", policy="knorm").policy == KNorm()
    assert find("snapkv", schedule="every-step").schedule == Schedule(every=1)
    assert find("h2o", schedule="prompt").schedule == Schedule()


def test_presets_come_before_single_parameters():
    chosen = find("snapkv", preset="kvpress", window=16)
    assert (chosen.policy.window, chosen.policy.pool) == (16, "avg")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"windw": 3}, "unknown parameter 'windw'; did you mean 'window'"),
        ({"window": "many"}, "window='many': expected int"),
        ({"window": 2.5}, "window=2.5: expected int"),
        ({"window": True}, "window=True: expected int"),
        ({"pool": "median"}, "expected none | avg | max"),
        ({"kernel": 6}, "kernel=6: expected int (odd, 1 to 999)"),
        ({"preset": "kvpres"}, "did you mean 'kvpress'"),
        ({"budget": "pyramids"}, "did you mean 'pyramid'"),
        ({"schedule": "sometimes"}, "use prompt, every-step or every-N"),
        ({"every": 0}, "every=0: expected int (1 or more) or none"),
        ({"skip_layers": "a,b"}, "expected numbers with commas"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(UsageError) as error:
        find("snapkv", **settings)
    assert message in str(error.value)


def test_what_is_no_value_of_that_kind_is_refused_as_any_other():
    with pytest.raises(UsageError, match="skip_layers=3: expected numbers with commas"):
        find("circuitkv", skip_layers=3)
    with pytest.raises(UnknownNameError, match="unknown preset of snapkv"):
        find("snapkv", preset=["kvpress"])


@pytest.mark.parametrize("name", sorted(kvtrim.METHODS))
def test_who_wraps_a_scorer_takes_those_that_score_at_sight_alone(name):
    """Of others the first pass would want what it has not."""
    for outer, part in (("criticalkv", "base"), ("fastkv", "scorer")):
        try:
            made = find(outer, **{part: name})
        except UsageError as refused:
            assert any(said in str(refused) for said in ("at sight", "wraps scorers"))
            continue
        q, k = torch.randn(2, 4, 40, 8), torch.randn(2, 2, 40, 8)
        own = {"layer": 0} if outer == "fastkv" else {}
        output, states = [torch.randn(16, 32)] * 2, torch.randn(2, 40, 16)
        assert kvtrim.select(made, q, k, k, keep=38, output=output, hidden=states, **own)


def test_unknown_methods_name_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'snapkv'"):
        find("snapvk")


def test_methods_of_your_own_are_found_by_module_and_name():
    assert find("test_settings:MINE").policy.window == 3
    with pytest.raises(UsageError, match="not a kvtrim Method"):
        find("test_settings:pytest")
    with pytest.raises(UsageError, match="cannot load method 'nowhere:X'"):
        find("nowhere:X")
    with pytest.raises(UsageError, match="cannot load method"):
        find("test_settings:NOTHING")


def test_parameters_lists_all_that_find_changes():
    listed = parameters(kvtrim.METHODS["adakv"])
    assert listed["policy.window"] == 32 and listed["budget.floor"] == 0.2
    for name, value in listed.items():
        assert parameters(find("adakv", **{name: value}))[name] == value


def test_split_tells_parameters_from_other_options():
    mine, rest = split("snapkv", {"window": 8, "num_beams": 2, "preset": "kvf", "budget.x": 1})
    assert mine == {"window": 8, "preset": "kvf"}
    assert rest == {"num_beams": 2, "budget.x": 1}


@pytest.mark.parametrize(
    ("text", "name", "settings", "label"),
    [
        ("snapkv", "snapkv", {}, "snapkv"),
        ("snapkv:window=16", "snapkv", {"window": "16"}, "snapkv:window=16"),
        (" snapkv: window = 16 ,preset=kvf", "snapkv", {"window": "16", "preset": "kvf"},
         "snapkv:preset=kvf,window=16"),
        ("knorm:skip_layers=0, 1,budget.x=a=b", "knorm", {"skip_layers": "0,1", "budget.x": "a=b"},
         "knorm:budget.x=a=b,skip_layers=0,1"),
        ("my.methods:MINE", "my.methods:MINE", {}, "my.methods:MINE"),
        ("my.methods:MINE:x=3", "my.methods:MINE", {"x": "3"}, "my.methods:MINE:x=3"),
    ],
)  # fmt: skip
def test_a_variant_is_a_name_with_parameters(text, name, settings, label):
    found = Variant.parse(text)
    assert (found.name, found.settings, str(found)) == (name, settings, label)
    assert Variant.parse(str(found)) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no method"),
        (":window=16", "names no method"),
        ("snapkv=window", "names no method"),
        ("snapkv:window=16,window=8", "window is given twice"),
    ],
)
def test_text_that_is_no_variant_is_refused(text, message):
    with pytest.raises(UsageError, match=message):
        Variant.parse(text)


def test_a_label_says_values_as_they_are_read():
    own = {"skip_layers": (0, 1), "demote": True, "kernel": 5}
    label = str(Variant("snapkv", own))
    assert label == "snapkv:demote=true,kernel=5,skip_layers=0,1"
    assert find(label) == find("snapkv", **own)


def test_a_method_is_found_with_the_parameters_behind_its_name():
    assert find("snapkv:preset=kvf,window=16") == find("snapkv", preset="kvf", window=16)
    assert find("test_settings:MINE:window=5").policy.window == 5
    assert split("criticalkv:base=h2o", {"heavy": 4, "x": 1}) == ({"heavy": 4}, {"x": 1})
    with pytest.raises(UsageError, match="window is given twice"):
        find("snapkv:window=16", window=8)
    with pytest.raises(UsageError, match="did you mean 'window'"):
        find("snapkv:windw=16")
    with pytest.raises(UsageError, match="auto takes no settings"):
        find("auto:window=16")


def test_shared_parameters_go_where_they_are_not_set():
    chosen = candidates(["full", "snapkv:window=16", "snapkv", "knorm"], ["40"], {"window": "8"})
    assert [c.label for c in chosen[1:]] == [
        "full", "snapkv:window=16", "snapkv:window=8", "knorm:window=8"
    ]  # fmt: skip
    assert len({c.label for c in candidates(["snapkv", "snapkv:window=8"], ["40"])[1:]}) == 2
    with pytest.raises(UsageError, match="the methods that have it set their own"):
        candidates(["snapkv:window=16"], ["40"], {"window": "8"})


def test_what_a_method_is_goes_into_records():
    found = spell_out(find("pyramidkv:window=16"))
    assert (found["policy"], found["policy.window"]) == ("SnapKV", 16)
    assert (found["budget"], found["skip_layers"]) == ("Pyramid", [])
    assert json.loads(json.dumps(found)) == found
