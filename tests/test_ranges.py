"""Every parameter says what it may be, where it stands, and nothing else is accepted."""

import inspect
import itertools
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated

import pytest
import torch

import kvtrim
from kvtrim.errors import UnknownNameError, UsageError
from kvtrim.methods import ranges
from kvtrim.methods.budgets import BUDGETS
from kvtrim.methods.method import Method
from kvtrim.methods.policies.base import Policy
from kvtrim.methods.policies.snapkv import SnapKV
from kvtrim.methods.propagation import PROPAGATIONS
from kvtrim.methods.ranges import Range, Share, Some, Tokens, check_arguments
from kvtrim.methods.refit import REFITS
from kvtrim.methods.registry import METHODS
from kvtrim.methods.schedule import Schedule
from kvtrim.methods.settings import UNITS, find, parameters, split

POLICIES = list(dict.fromkeys(type(method.policy) for method in METHODS.values()))  # in order
PARTS = [*POLICIES, *BUDGETS.values(), *UNITS.values(), *PROPAGATIONS.values(), Schedule, Method]
PARTS += [type(make()) for make in REFITS.values()]


def numbers(owner):
    """(field, bare type, range) of every number that a part takes."""
    for each in fields(owner):
        for option in ranges.options(ranges.annotations_of(owner)[each.name]):
            bare, within = ranges.split_range(option)
            if bare in (int, float):
                yield each.name, bare, within


@pytest.mark.parametrize("owner", PARTS, ids=lambda owner: owner.__name__)
def test_every_number_declares_its_range(owner):
    for name, _, within in numbers(owner):
        assert within is not None, f"{owner.__name__}.{name} may be anything: declare its range"


def outside(bare, within):
    """Values just beyond the ends of a range, and what is no number."""
    step = 1 if bare is int else 1e-3
    yield within.low if within.above else within.low - step
    if within.high < 2**31 - 1:
        yield within.high if within.below else within.high + step
    if within.odd:
        yield 4
    if bare is float:
        yield from (float("nan"), float("inf"))


@pytest.mark.parametrize("name", METHODS)
def test_every_number_outside_its_range_is_refused_by_name(name):
    method = METHODS[name]
    for full in parameters(method):
        part, _, field = full.rpartition(".")
        owner = method
        for step in part.split(".") if part else []:
            owner = getattr(owner, step)
        for option in ranges.options(ranges.annotations_of(type(owner))[field]):
            bare, within = ranges.split_range(option)
            several = len([n for n, *_ in numbers(type(owner)) if n == field]) > 1
            for value in map(bare, outside(bare, within) if within and not several else ()):
                with pytest.raises(UsageError, match=rf"\b{field}="):
                    find(name, **{full: value})


def test_a_part_made_in_python_is_refused_too():
    for make in (
        lambda: SnapKV(window=-1),
        lambda: SnapKV(kernel=4),
        lambda: Method(SnapKV(), skip_layers=(-1,)),
        lambda: Method(SnapKV(), reuse=0),
    ):
        with pytest.raises(UsageError, match="expected"):
            make()
    for wrong in ("many", 2.5, True, None, -1, (1,)):  # jaxtyping is not there for users
        with pytest.raises(UsageError, match=r"window=.*expected int"):
            ranges.check("window", wrong, Some)


def test_a_post_init_of_ones_own_does_not_open_the_ranges():
    @dataclass(frozen=True)
    class Own(Policy):
        window: Tokens = 8

        def __post_init__(self):
            pass  # forgets the one above

        def lookback(self):
            return 1

        def score(self, layer):
            return layer.positions.float()

    assert Method(Own()).policy.window == 8
    with pytest.raises(UsageError, match=r"window=-2: expected int .0 or more"):
        Method(Own(window=-2))


def test_a_policy_that_is_no_frozen_dataclass_is_refused():
    class Bare(Policy):
        def lookback(self):
            return 0

        def score(self, layer):
            return layer.positions.float()

    @dataclass
    class Changing(Bare):
        window: int = 3

    @dataclass(frozen=True)
    class Fine(Bare):
        window: int = 3

    class Adds(Fine):
        kernel: int = 3

    for kind in (Bare, Changing, Adds):
        with pytest.raises(UsageError, match=f"{kind.__name__} is no frozen dataclass"):
            Method(kind())
    assert Method(Fine()).policy.window == 3


def test_arguments_are_refused_as_fields_are():
    @check_arguments
    def run(count: Some, share: Share = 0.5, *, label: str = "", limit: Tokens | None = None):
        return count, share, label, limit

    assert run(1, label="x") == (1, 0.5, "x", None)
    for arguments, named, message in (
        ((0,), {}, "count=0: expected int .1 or more"),
        ((1, 2), {}, "share=2: expected float .0 to 1"),
        ((1,), {"limit": -1}, "limit=-1: expected int .0 or more. or none"),
        ((True,), {}, "count=True"),
    ):
        with pytest.raises(UsageError, match=message):
            run(*arguments, **named)


@pytest.mark.parametrize("function", [kvtrim.generate, kvtrim.compress, kvtrim.Cache.__init__])
def test_every_count_that_the_public_functions_take_declares_its_range(function):
    for name, parameter in inspect.signature(function).parameters.items():
        wanted = ranges.annotations_of(inspect.unwrap(function)).get(name)
        named = str(parameter.annotation)
        if name != "keep" and any(o in (int, float) for o in ranges.options(wanted)):
            pytest.fail(f"{name}: {named} may be any number: declare its range")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": -3}, "max_new_tokens=-3"),
        ({"max_new_tokens": 2.0}, "max_new_tokens=2.0"),
        ({"prefill_chunk": 0}, "prefill_chunk=0"),
        ({"prefill_chunk": -1}, "prefill_chunk=-1"),
        ({"num_beams": 0}, "num_beams=0"),
        ({"num_beams": -2}, "num_beams=-2"),
        ({"temperature": 0.0, "do_sample": True}, "temperature=0.0"),
        ({"top_p": 1.5, "do_sample": True}, "top_p=1.5"),
        ({"top_k": -1, "do_sample": True}, "top_k=-1"),
        ({"windw": 3}, "unknown option 'windw'; did you mean 'window'"),
        ({"num_beans": 2}, "did you mean 'num_beams'"),
        ({"chunks": True, "policy": "knorm"}, "--prefill-chunk"),
        ({"skip_layers": (0, 9)}, "skip_layers=9"),
        ({"protocol": "both"}, "protocol='both': expected question-aware"),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_any_work(llama, monkeypatch, settings, named):
    from models import tokenizer

    monkeypatch.setattr(llama, "forward", None)
    with pytest.raises(UsageError) as refused:
        kvtrim.generate(
            llama, tokenizer(), "a b c " * 20, "d?", keep=40, **{"method": "snapkv", **settings}
        )
    assert named in str(refused.value)


def test_a_name_of_the_method_and_of_sampling_is_refused_with_both(llama):
    from models import tokenizer

    ask = dict(keep=40, max_new_tokens=2, method="circuitkv")
    with pytest.raises(UsageError) as refused:
        kvtrim.generate(llama, tokenizer(), "a b c " * 20, "d?", temperature=0.5, **ask)
    for said in ("temperature", "policy.temperature", "sampling.temperature"):
        assert said in str(refused.value)
    one, two = split(
        "circuitkv",
        {"policy.temperature": 0.5, "sampling.temperature": 0.7, "do_sample": True},
        {"temperature", "do_sample"},
    )
    assert one == {"policy.temperature": 0.5}
    assert two == {"temperature": 0.7, "do_sample": True}
    own = {"policy.temperature": 0.5}
    answer = kvtrim.generate(llama, tokenizer(), "a b c " * 20, "d?", **ask, **own)
    assert answer.kept == [[40, 40]] * 3
    assert split("circuitkv", {"temperature": 2.0}) == ({"temperature": 2.0}, {})


def test_parameters_of_a_part_that_is_swapped_in_belong_to_the_method():
    given = {"floor": 0.5, "budget": "per-head", "layers": "pyramid", "beta": 4, "num_beams": 2}
    mine, rest = split("knorm", given, {"num_beams"})
    assert rest == {"num_beams": 2} and mine.keys() == given.keys() - rest.keys()


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("h2o", {"heavy": 8, "window": None}),
        ("h2o", {"preset": "kvf", "heavy": 8, "window": None}),
        ("snapkv", {"kernel": 5, "window": 4, "sinks": 2, "every": 4}),
        ("streaming-llm", {"ahead": True, "every": 1, "positions": "rolled", "sinks": 2}),
        ("knorm", {"beta": 7, "layers": "pyramid", "floor": 0.1, "budget": "per-head"}),
        ("knorm", {"share": 0.5, "newest": 3, "region": "generated", "every": 2}),
        ("knorm", {"ahead": False, "region": "generated", "every": 1, "chunks": False}),
        ("criticalkv", {"base": "pyramidkv", "window": 4, "kernel": 3, "first_stage": 0.25}),
        ("knorm", {"budget": "per-head", "budget.layers.layers": "pyramid", "layers": "per-head"}),
        ("laprox", {"budget": "uniform", "unit": "chunk", "chunk": 5, "reuse": 2}),
    ],
)
def test_the_order_of_settings_does_not_matter(method, settings):
    found = {find(method, **dict(order)) for order in itertools.permutations(settings.items())}
    assert len(found) == 1


def test_settings_that_name_one_parameter_twice_are_refused():
    with pytest.raises(UsageError, match=r"window and policy.window are the same parameter"):
        find("snapkv", **{"window": 3, "policy.window": 4})


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("full", {"every": 4}, "nothing to act on"),
        ("gemfilter", {"skip_layers": (0,)}, "nothing to act on"),
        ("streaming-llm", {"ahead": True}, "ahead says when every acts"),
        ("knorm", {"share": 0.5, "every": 2}, "set region=generated"),
        ("snapkv", {"budget": 3}, "budget=3: expected Budget"),
    ],
)
def test_settings_that_nothing_acts_on_are_refused(method, settings, message):
    with pytest.raises(UsageError, match=message):
        find(method, **settings)


def own(score, **more):
    @dataclass(frozen=True)
    class Own(Policy):
        def lookback(self):
            return 1

        def recent(self, keep):
            return 2

    Own.score = score
    for name, what in more.items():
        setattr(Own, name, what)
    Own.__abstractmethods__ = frozenset()
    return Method(Own())


def norms(layer):
    return layer.values.float().norm(dim=-1)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (
            lambda self, layer: norms(layer)[..., :-3],
            r"gave shape \[1, 2, 17\], expected \[1, 2, 18",
        ),
        (lambda self, layer: norms(layer).mean(1, keepdim=True), r"gave shape \[1, 1, 20\]"),
        (lambda self, layer: norms(layer).sum(), r"gave shape \[\]"),
        (lambda self, layer: norms(layer)[0], r"gave shape \[2, 20\]"),
        (lambda self, layer: norms(layer) * float("nan"), "gave NaN in layer 0"),
        (lambda self, layer: norms(layer).long(), "a tensor of torch.int64"),
        (lambda self, layer: norms(layer).tolist(), "gave list"),
        (lambda self, layer: None, "gave NoneType"),
    ],
)
@pytest.mark.parametrize("budget", ["uniform", "per-head", "global"])
def test_scores_that_are_none_name_the_policy(score, message, budget):
    method = own(score)
    tensors = torch.randn(4, 20, 8), torch.randn(2, 20, 8), torch.randn(2, 20, 8)
    with pytest.raises(UsageError, match=message) as refused:
        kvtrim.select(method, *tensors, keep=8, budget=budget)
    assert "test_ranges.Own.score" in str(refused.value)


def test_what_a_policy_observes_is_checked_as_well():
    method = own(
        lambda self, layer: layer.carried,
        carries=True,
        observe=lambda self, layer: norms(layer)[:, :1],
    )
    tensors = torch.randn(4, 20, 8), torch.randn(2, 20, 8), torch.randn(2, 20, 8)
    with pytest.raises(UsageError, match=r"Own.observe gave shape \[1, 1, 20\]"):
        kvtrim.select(method, *tensors, keep=8)


def test_ranges_say_themselves_in_words():
    said = {
        Range(0, 1): "0 to 1",
        Range(0, 1, above=True): "above 0, at most 1",
        Range(0, 1, below=True): "0 to below 1",
        Range(2): "2 or more",
        Range(0, above=True): "above 0",
        Range(1, 9, odd=True): "odd, 1 to 9",
    }
    assert {each: str(each) for each in said} == said
    assert ranges.in_words(Annotated[int, Range(1)] | None) == "int (1 or more) or none"
    with pytest.raises(UnknownNameError):
        find("snapkv", nothing=1)
    assert not is_dataclass(ranges.in_words)
