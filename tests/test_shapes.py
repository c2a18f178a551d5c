"""The checks of types and shapes that every other test runs under."""

import random
import sys
import textwrap

import jaxtyping
import pytest
import torch

import shapes

MODULE = """
    from dataclasses import dataclass
    from torch import Tensor
    from jaxtyping import Float

    Summed = Float[Tensor, "B"]

    @dataclass
    class Pair:
        one: Float[Tensor, "B K"]
        other: "Float[Tensor, 'B']"

        @property
        def wrong(self) -> Float[Tensor, "B"]:
            return self.one

        @staticmethod
        def count(number: int) -> int:
            return number

    def joined(one: Float[Tensor, "B K"], other: Float[Tensor, "K B"] | None) -> Summed:
        return one.sum(1) if one.shape[1] > 1 else one

    def twice(one: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        return twice(one[1:]).new_zeros(len(one)) if len(one) > 1 else one

    def later(one: Float[Tensor, "B"]):
        for at in range(len(one)):
            yield twice(one[at:])

    def inner(one: Float[Tensor, "B K"]):
        def within(other: Float[Tensor, "B"]) -> Tensor:
            return other
        return within(one)

    TABLE = {"joined": joined}
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "checked_here.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[:])
    shapes.check(["checked_here"])
    import checked_here

    yield checked_here
    del sys.modules["checked_here"]


def zeros(*shape):
    return torch.zeros(shape)


def test_what_fits_goes_through(module):
    assert module.joined(zeros(3, 2), zeros(2, 3)).shape == (3,)
    assert module.joined(zeros(4, 2), None).shape == (4,)  # letters are free again
    assert module.twice(zeros(3)).shape == (3,)  # and other ones within a call
    assert len([*module.later(zeros(3))]) == 3
    assert module.Pair(zeros(2, 3), zeros(2)).count(3) == 3


def test_what_does_not_fit_is_an_error(module):
    wrong = [
        lambda: module.joined(zeros(3, 2), zeros(3, 2)),  # arguments beside each other
        lambda: module.TABLE["joined"](zeros(3), None),
        lambda: module.joined(zeros(3, 1), None),  # what is returned
        lambda: module.joined(torch.zeros(3, 2, dtype=torch.int64), None),
        lambda: module.inner(zeros(3, 2)),
        lambda: module.Pair(zeros(3, 2), zeros(2)),
        lambda: module.Pair(zeros(2, 3), zeros(2)).wrong,
        lambda: module.Pair.count("3"),
    ]
    for call in wrong:
        with pytest.raises(TypeError, match="violates type hint"):
            call()
    assert module.twice(zeros(3)).shape == (3,)  # nothing is left over from a call that failed


def test_types_without_shapes_are_checked_for_some_calls(module):
    for _ in range(shapes.PLAIN - 1):
        module.Pair.count(3)
    with pytest.raises(TypeError, match="violates type hint"):
        module.Pair.count("3")
    shapes.begin_test()
    assert module.Pair.count("3") == "3"


def test_shapes_are_checked_at_the_first_calls_of_every_test_and_at_some_later_ones(module):
    def refused():
        try:
            module.joined(zeros(3, 1), zeros(1, 3))
        except TypeError:
            return True
        return False

    for _ in range(2):
        calls = [refused() for _ in range(5 * shapes.SPARSE + shapes.SHAPED)]
        assert all(calls[: shapes.SHAPED]) and sum(calls[shapes.SHAPED :]) == 5
        shapes.begin_test()


def test_shapes_say_what_jaxtyping_says():
    kinds = (jaxtyping.Float, jaxtyping.Int, jaxtyping.Bool)
    types = (torch.float64, torch.bfloat16, torch.int32, torch.int64, torch.bool, torch.uint8)
    draw, said = random.Random(0), []
    for _ in range(700):
        before, shapes._calls.letters = shapes._calls.letters, {}
        with jaxtyping.jaxtyped("context"):
            for _ in range(4):  # tensors of one call
                dims = draw.choices("A A A B B 2 1".split(), k=draw.randint(0, 3))
                if draw.random() < 0.3:
                    dims.insert(draw.randint(0, len(dims)), draw.choice(("*A", "*C", "...")))
                hint = draw.choice(kinds)[torch.Tensor, " ".join(dims)]
                shape = shapes.Shape(hint)
                made = torch.zeros(draw.choices((1, 2), k=draw.randint(0, 4)))
                value = made.to(draw.choice(types[:1] * 4 + types))
                assert isinstance(value, shape) == isinstance(value, hint), (hint, value.shape)
                said.append(isinstance(value, hint))
                assert not isinstance(None, shape)
        shapes._calls.letters = before
    assert 100 < sum(said) < len(said) - 100


@pytest.mark.parametrize("dims", ["#B", "B+1", "_", "?B", "B=3"])
def test_what_shapes_do_not_know_is_refused(dims):
    with pytest.raises(TypeError, match="understands"):
        shapes.Shape(jaxtyping.Float[torch.Tensor, dims])
