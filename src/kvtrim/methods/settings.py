"""Changing a method's parameters by name, from Python values or from text (`--set name=value`).

A name is searched in the method itself and in its parts (policy, budget, schedule, propagation,
unit, refit); where two parts have it, say which: `budget.floor=0.5`. `budget=per-head` replaces a
whole part.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin

from kvtrim.errors import UnknownNameError, UsageError
from kvtrim.methods import auto, entry_points, ranges
from kvtrim.methods.budgets import BUDGETS, Budget
from kvtrim.methods.method import Method
from kvtrim.methods.policies.base import Policy
from kvtrim.methods.propagation import PROPAGATIONS
from kvtrim.methods.refit import REFITS
from kvtrim.methods.registry import METHODS
from kvtrim.methods.schedule import Schedule
from kvtrim.methods.unit import Chunk, Shot, Token, Unit
from kvtrim.methods.variant import Variant

PARTS = ("policy", "budget", "schedule", "propagation", "unit", "refit")
UNITS: dict[str, type[Unit]] = {"token": Token, "chunk": Chunk, "shot": Shot}
_SAMPLING = "sampling."
_GROUP = "kvtrim.methods"
_NOT_SETTINGS = {"source", "use", "cost", "presets", *PARTS}


def find(name: "str | Method", **settings: Any) -> Method:
    """The method of that name with its parameters changed; their order does not matter.

    Args:
        name: a name of `METHODS` or of an installed package, `module:ATTRIBUTE` of your own, each
            with parameters behind it (`snapkv:window=16`, see `Variant`), or a `Method`.
        settings: parameters by name, and `preset` for a set of them that the method names.

    Raises:
        UnknownNameError: nobody has that name; the message says which one is near.
        UsageError: a value of the wrong kind or outside its range, or values that do not go
            together.
    """
    method, settings = _combine(name, settings)
    if not settings:
        return method
    if method is auto.AUTO:
        raise UsageError(auto.NO_SETTINGS)
    draft = _make_draft(name, method, settings.pop("preset", None))
    draft.change(settings)
    return draft.make()


def parameters(method: Method) -> dict[str, Any]:
    """Every parameter that `find` would change, by its full name: {"policy.window": 32, ...}."""
    own = {f.name: getattr(method, f.name) for f in fields(method) if f.name not in _NOT_SETTINGS}
    for part in PARTS:
        own |= _parameters(part, getattr(method, part))
    return own


def _parameters(prefix: str, owner: Any) -> dict[str, Any]:
    """The fields of a part and, behind their names, those of the parts inside it."""
    found: dict[str, Any] = {}
    for each in fields(owner):
        name, value = f"{prefix}.{each.name}", getattr(owner, each.name)
        found[name] = value
        if is_dataclass(value):
            found |= _parameters(name, value)
    return found


def spell_out(method: Method) -> dict[str, Any]:
    """All that a method is, as JSON has it: each part by its class, each parameter by its value,
    {"policy": "SnapKV", "policy.window": 32, ...}.
    """
    parts = {part: getattr(method, part) for part in PARTS}
    return {name: _plain(value) for name, value in (parts | parameters(method)).items()}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return type(value).__name__
    return list(value) if isinstance(value, tuple) else value


def takes(owner: type, field: str) -> str:
    """What a parameter of a part may be: "int (1 or more) or none", "avg | max"."""
    return ranges.in_words(ranges.annotations_of(owner)[field])


def split(
    name: "str | Method", options: Mapping[str, Any], others: Collection[str] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part keywords into the method's parameters and the rest.

    Args:
        others: the names that the rest may have, if they are known; `sampling.NAME` is then the
            one of them where the method has a parameter of that name too.

    Raises:
        UsageError: a name that both have; says how to write the one and the other.
        UnknownNameError: a name that nobody has.
    """
    method, told = _combine(name, options)
    draft = _make_draft(name, method, told.get("preset"))
    draft.change_parts(told)
    paths = draft.paths()
    of = {key: [full for full in paths if f".{full}".endswith(f".{key}")] for key in options}
    own = {key for key in options if of[key] or key in (*PARTS, "preset")}
    mine = {key: value for key, value in options.items() if key in own}
    rest = {key: value for key, value in options.items() if key not in own}
    if others is None:
        return mine, rest
    for key in mine:
        if key in others:
            full = of[key][0]
            raise UsageError(
                f"{key} is a parameter of the method ({full}) and of sampling: write "
                f"**{{'{full}': ...}} for the one, **{{'{_SAMPLING}{key}': ...}} for the other"
            )
    rest = {key.removeprefix(_SAMPLING): value for key, value in rest.items()}
    if mine and method is auto.AUTO:
        raise UsageError(auto.NO_SETTINGS)
    for key in rest:
        if key not in others:
            if method is auto.AUTO and _known_somewhere(key):
                raise UsageError(auto.NO_SETTINGS)
            short = {full.rpartition(".")[2] for full in paths}
            raise UnknownNameError("option", key, {*short, *PARTS, "preset", *others})
    return mine, rest


def _combine(name: "str | Method", settings: Mapping[str, Any]) -> tuple[Method, dict[str, Any]]:
    """The method of a name, and the parameters behind the name with these."""
    if isinstance(name, Method):
        return name, dict(settings)
    variant = Variant.parse(name)
    return _method_of(variant.name), variant.merge(settings)


def _make_draft(name: "str | Method", method: Method, preset: Any) -> "_Draft":
    """A method to be changed, after one of its presets."""
    draft = _Draft.of(method)
    if preset is not None:
        if not isinstance(preset, str) or preset not in method.presets:
            raise UnknownNameError(f"preset of {name}", str(preset), method.presets)
        draft.change(method.presets[preset])
    return draft


def _known_somewhere(key: str) -> bool:
    """Whether some method of the registry has a parameter of that name."""
    return any(
        f".{full}".endswith(f".{key}") for one in METHODS.values() for full in parameters(one)
    )


def names() -> list[str]:
    """Every method that has a name: kvtrim's own, then those of installed packages."""
    return [*METHODS, *entry_points.names(_GROUP)]


def places(asked: Iterable[str]) -> tuple[str, ...]:
    """Those of the names that do not come with kvtrim, as `module:ATTRIBUTE`."""
    return entry_points.places(_GROUP, asked)


def _method_of(name: str) -> Method:
    if ":" in name:
        return entry_points.import_object(name, Method)
    other = entry_points.find_offer(_GROUP, name, Method, [*METHODS, auto.NAME])
    if other is not None:
        return other
    if name == auto.NAME:
        return auto.AUTO
    if name not in METHODS:
        raise UnknownNameError("method", name, [*names(), auto.NAME])
    return METHODS[name]


@dataclass
class _Draft:
    """A part while its parameters change. Nothing is checked before all of them have, so that
    their order does not matter.
    """

    kind: type
    values: dict[str, Any]

    @classmethod
    def of(cls, part: Any) -> "_Draft":
        ranges.require_frozen(type(part))
        values = {each.name: getattr(part, each.name) for each in fields(part) if each.init}
        return cls(
            type(part), {name: cls.of(x) if is_dataclass(x) else x for name, x in values.items()}
        )

    def make(self) -> Any:
        """The part, checked.

        Raises:
            UsageError: parameters that cannot be, or not together.
        """
        values = {
            name: x.make() if isinstance(x, _Draft) else x for name, x in self.values.items()
        }
        return self.kind(**values)

    def paths(self, prefix: str = "") -> dict[str, tuple["_Draft", str]]:
        """Every parameter by its full name: whose it is, and its own name there."""
        found: dict[str, tuple[_Draft, str]] = {}
        for name, value in self.values.items():
            if prefix or name not in _NOT_SETTINGS:
                found[prefix + name] = (self, name)
            if isinstance(value, _Draft):
                found |= value.paths(f"{prefix}{name}.")
        return found

    def change(self, settings: Mapping[str, Any]) -> None:
        """Change parameters: whole parts first, so that `budget=per-head, floor=0.5` finds the new
        part's parameter.

        Raises:
            UnknownNameError, UsageError: as `find`.
        """
        changed = self.change_parts(settings)
        for name, value in settings.items():
            if name not in (*PARTS, *changed.values()):
                known = self.paths()
                self._set(_match(known, name), name, value, changed)

    def change_parts(self, settings: Mapping[str, Any]) -> dict[str, str]:
        """Change what is a part with parameters of its own, those nearer to the method before
        those inside them; gives the full names of what was changed, with the names given.

        What is no parameter at all is left alone.
        """
        for part in PARTS:
            if part in settings:
                self.values[part] = _whole(_part(part, settings[part]))
        changed: dict[str, str] = {}
        while True:
            known = self.paths()
            found = {
                full: name
                for name in settings
                if name not in (*PARTS, *changed.values())
                if (full := _match(known, name, strict=False)) and _takes_part(*known[full])
            }
            if not found:
                return changed
            full = min(found, key=lambda one: (one.count("."), one))
            self._set(full, found[full], settings[found[full]], changed)

    def _set(self, full: str, name: str, value: Any, changed: dict[str, str]) -> None:
        if full in changed:
            raise UsageError(f"{changed[full]} and {name} are the same parameter; give one")
        changed[full] = name
        owner, field = self.paths()[full]
        owner.values[field] = _whole(_convert(owner.kind, field, value))


def _whole(value: Any) -> Any:
    return _Draft.of(value) if is_dataclass(value) and not isinstance(value, type) else value


def _takes_part(owner: _Draft, field: str) -> bool:
    """Whether a parameter is a part by itself, with parameters of its own."""
    return any(option in _PARTS_BY_NAME for option in _options(owner.kind, field))


def _match(known: Mapping[str, Any], name: str, strict: bool = True) -> str:
    """The full name of a parameter; not `strict`: "" where there is not exactly one.

    Raises:
        UnknownNameError: nobody has it.
        UsageError: several have it.
    """
    matches = [full for full in known if full == name or full.endswith("." + name)]
    exact = [full for full in matches if full == name]
    if len(exact or matches) > 1 and strict:
        raise UsageError(f"{name!r} is ambiguous here; say {' or '.join(matches)}")
    if not matches and strict:
        short = [full.rpartition(".")[2] for full in known]
        raise UnknownNameError("parameter", name, [*short, *PARTS, "preset"])
    return (exact or matches)[0] if len(exact or matches) == 1 else ""


def _part(part: str, value: Any) -> Any:
    """A whole part by name; an object is taken as it is.

    Raises:
        UnknownNameError: no part has that name.
        UsageError: an object of another kind.
    """
    if not isinstance(value, str):
        ranges.check(part, value, ranges.annotations_of(Method)[part])
        return value
    makers: dict[str, Callable[[str], Any]] = {
        "policy": _policy,
        "budget": _budget,
        "schedule": _schedule,
        "propagation": lambda name: _lookup("propagation", name, PROPAGATIONS)(),
        "unit": lambda name: _lookup("unit", name, UNITS)(),
        "refit": lambda name: _lookup("refit", name, REFITS)(),
    }
    return makers[part](value)


def _policy(name: str) -> Policy:
    if name not in names():
        raise UnknownNameError("policy", name, names())
    return _method_of(name).policy


def _budget(name: str) -> Budget:
    return _lookup("budget", name, BUDGETS)()


_PARTS_BY_NAME: dict[Any, Callable[[str], Any]] = {Budget: _budget, Policy: _policy}


def _schedule(name: str) -> Schedule:
    if name == "prompt":
        return Schedule()
    match = re.fullmatch(r"every-(step|[0-9]+)", name)
    if match is None:
        raise UsageError(f"unknown schedule {name!r}; use prompt, every-step or every-N")
    return Schedule(every=1 if match[1] == "step" else int(match[1]))


def _lookup(kind: str, name: str, table: Mapping[str, Any]) -> Any:
    if name not in table:
        raise UnknownNameError(kind, name, table)
    return table[name]


def _convert(owner: type, field: str, value: Any) -> Any:
    """The value as the field's type, which may be given as text."""
    for option in _options(owner, field):
        done, result = _as(option, value)
        if done:
            return result
    raise UsageError(f"{field}={value!r}: expected {takes(owner, field)}")


def _options(owner: type, field: str) -> tuple[Any, ...]:
    """The types that a parameter may have, without their ranges."""
    wanted = ranges.annotations_of(owner)[field]
    return tuple(ranges.split_range(option)[0] for option in ranges.options(wanted))


def _as(wanted: Any, value: Any) -> tuple[bool, Any]:
    """(True, the value as that type) or (False, None)."""
    text = value.strip().lower() if isinstance(value, str) else None
    if wanted is type(None):
        return value is None or text == "none", None
    if get_origin(wanted) is Literal:
        return value in get_args(wanted), value
    if wanted is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        return (True, words[text]) if text in words else (isinstance(value, bool), value)
    if get_origin(wanted) is tuple:
        return _as_tuple(ranges.split_range(get_args(wanted)[0])[0], value)
    if wanted in _PARTS_BY_NAME and text != "none":
        named = _PARTS_BY_NAME[wanted](value) if isinstance(value, str) else value
        return isinstance(named, wanted), named
    if wanted in (int, float):
        return _as_number(wanted, value)
    return isinstance(value, wanted), value


def _as_number(wanted: type, value: Any) -> tuple[bool, Any]:
    kinds = (str, int) if wanted is int else (str, int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        return False, None
    try:
        return True, wanted(value)
    except (ValueError, OverflowError):
        return False, None


def _as_tuple(item: type, value: Any) -> tuple[bool, Any]:
    if isinstance(value, str):
        value = [part for part in value.split(",") if part not in ("", "none")]
    if not isinstance(value, Iterable):
        return False, None
    parts = list(value)
    results = [_as(item, part) for part in parts]
    return all(done for done, _ in results), tuple(result for _, result in results)
