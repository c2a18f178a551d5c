"""What a parameter may be, declared where it is: `window: Tokens = 32`, `floor: Share = 0.2`.

One mechanism for fields and arguments. `require(part)` refuses a dataclass, and those inside it,
whose fields lie outside what they declare; `check_arguments` does the same for a function's
arguments. Whole numbers and fractions without a declaration of their own must be finite at least.
"""

import types
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, wraps
from inspect import signature
from math import inf, isfinite
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from kvtrim.errors import UsageError

Call = TypeVar("Call", bound=Callable[..., Any])


@dataclass(frozen=True)
class Range:
    """The numbers that a parameter may be, ends included unless it says otherwise."""

    low: float
    high: float = inf
    above: bool = False  # `low` itself is out
    below: bool = False  # and so is `high`
    odd: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number lies in it."""
        begins = value > self.low if self.above else value >= self.low
        ends = value < self.high if self.below else value <= self.high
        return begins and ends and (not self.odd or value % 2 == 1)

    def __str__(self) -> str:
        if self.low == -inf:
            return "any"
        odd, low = "odd, " * self.odd, f"{self.low:g}"
        high = f"{'below ' * self.below}{self.high:.12g}"
        if self.high >= _MOST:
            return f"{odd}above {low}" if self.above else f"{odd}{low} or more"
        return f"{odd}above {low}, at most {high}" if self.above else f"{odd}{low} to {high}"


_MOST = 2**31 - 1  # tokens, entries, steps: what an index of 32 bits counts

Tokens = Annotated[int, Range(0, _MOST)]
"""A number of tokens, entries or layers; none of them too."""

Some = Annotated[int, Range(1, _MOST)]
"""Likewise, one or more."""

Kernel = Annotated[int, Range(1, 999, odd=True)]
"""The width of a pooling, which has a middle."""

Share = Annotated[float, Range(0, 1)]
"""A share of something."""

Amount = Annotated[int, Range(1, _MOST)] | Annotated[float, Range(0, 1, above=True)]
"""A number of tokens (2048), or a share of those there are (0.2)."""

Weight = Annotated[float, Range(0)]
"""A factor that is not negative."""

Positive = Annotated[float, Range(0, above=True)]
"""A factor or exponent."""

COLDEST = 1e-5
"""Lower temperatures would be 0 in the precision of logits: where 0 means greedy, so do they."""

Temperature = Annotated[float, Range(COLDEST)]
"""Of sampling."""

Number = Annotated[float, Range(-inf)]
"""Any number; of a score, say, whose range the policy decides."""

Seed = Annotated[int, Range(0, 2**32 - 1)]
"""What random numbers start from."""


def options(annotation: Any) -> tuple[Any, ...]:
    """The types that a parameter may have: those of a union, or the one."""
    union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if union else (annotation,)


def split_range(option: Any) -> tuple[Any, Range | None]:
    """A type and the range declared with it."""
    if get_origin(option) is not Annotated:
        return option, None
    bare, *said = get_args(option)
    return bare, next((one for one in said if isinstance(one, Range)), None)


def in_words(annotation: Any) -> str:
    """What a parameter takes, in words: "int (0 or more) or none", "avg | max"."""
    return " or ".join(_words(option) for option in options(annotation))


@cache
def annotations_of(owner: Any) -> dict[str, Any]:
    """The annotations of a class or function, with their ranges."""
    return get_type_hints(owner, include_extras=True)


def check(name: str, value: Any, annotation: Any) -> None:
    """Refuse a value outside what is declared.

    Raises:
        UsageError: naming the parameter, its value and what it takes.
    """
    if not any(_fits(value, option) for option in options(annotation)):
        raise UsageError(f"{name}={value!r}: expected {in_words(annotation)}")


class Declared:
    """A dataclass whose fields are what they declare, or it is not made.

    A `__post_init__` of one's own calls this one first.
    """

    def __post_init__(self) -> None:
        require(self)


def require(owner: Any) -> None:
    """Refuse a dataclass, or one inside it, with a field outside what it declares.

    Raises:
        UsageError: naming the field, or a part that is no frozen dataclass.
    """
    require_frozen(type(owner))
    annotations = annotations_of(type(owner))
    for each in fields(owner):
        value = getattr(owner, each.name)
        check(each.name, value, annotations[each.name])
        if isinstance(value, Declared) or is_dataclass(value):
            require(value)


def require_frozen(kind: type) -> None:
    """Refuse a class whose objects could change, or whose parameters nobody would find.

    Raises:
        UsageError: it is no frozen dataclass, or adds parameters without being one itself.
    """
    made = getattr(kind, "__dataclass_params__", None)
    adds = "__dataclass_params__" not in vars(kind) and vars(kind).get("__annotations__")
    if made is None or not made.frozen or adds:
        raise UsageError(
            f"{kind.__name__} is no frozen dataclass: write @dataclass(frozen=True) above it"
        )


def check_arguments(function: Call) -> Call:
    """A function that refuses arguments outside what its annotations declare."""
    known = signature(function)

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        for name, value in known.bind(*arguments, **named).arguments.items():
            annotation = annotations_of(function).get(name)
            if any(map(_is_declared, options(annotation))):
                check(name, value, annotation)
        return function(*arguments, **named)

    return call  # pyright: ignore[reportReturnType] (the same signature)


def _is_declared(option: Any) -> bool:
    """Whether it says which values there are, not only of which type."""
    return get_origin(option) is Literal or split_range(option)[1] is not None


def _fits(value: Any, option: Any) -> bool:
    bare, within = split_range(option)
    if bare in (int, float):
        kinds = int if bare is int else (int, float)
        number = isinstance(value, kinds) and not isinstance(value, bool)
        return number and isfinite(value) and (within is None or within.holds(value))
    if bare is type(None):
        return value is None
    if get_origin(bare) is Literal:
        return value in get_args(bare)
    if get_origin(bare) is tuple:
        item = get_args(bare)[0]
        return isinstance(value, tuple) and all(
            any(_fits(one, each) for each in options(item)) for one in value
        )
    return not isinstance(bare, type) or isinstance(value, bare)


def _words(option: Any) -> str:
    bare, within = split_range(option)
    if bare is type(None):
        return "none"
    if get_origin(bare) is Literal:
        return " | ".join(str(choice) for choice in get_args(bare))
    if get_origin(bare) is tuple:
        _, within = split_range(get_args(bare)[0])
        bare, name = tuple, "numbers with commas"
    else:
        name = getattr(bare, "__name__", str(bare))
    return name if within is None else f"{name} ({within})"
