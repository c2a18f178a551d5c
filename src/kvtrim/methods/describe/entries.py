"""One method as a record: what it does, what it costs, its parameters and presets."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import Any, ClassVar, cast

from kvtrim.methods import auto
from kvtrim.methods.budgets import BUDGETS, Budget
from kvtrim.methods.describe.sources import Text, meanings_of, text_of
from kvtrim.methods.method import Method
from kvtrim.methods.policies.base import Policy
from kvtrim.methods.propagation import Propagation
from kvtrim.methods.refit import Refit
from kvtrim.methods.registry import METHODS
from kvtrim.methods.schedule import Schedule
from kvtrim.methods.settings import PARTS, find, parameters, takes
from kvtrim.methods.unit import Unit

_COLUMNS = ("scorer", "budget", "unit", "propagation")
_LATER, _SILENT = "as what it becomes", Text("", "", {})
_COMMON = {f.name: f.default for f in fields(Method)} | {
    f"schedule.{f.name}": f.default for f in fields(Schedule)
}


@dataclass(frozen=True)
class Part:
    """A policy, budget, unit or propagation."""

    kind: str
    name: str
    text: Text

    @property
    def sentences(self) -> str:
        """What it says of itself beside its references: what it is, its rule, the rest."""
        text = self.text
        return " ".join(f"{text.summary} {text.labels.get('Rule', '')} {text.body}".split())


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method and its default there."""

    path: str  # policy.window
    default: str  # as `--set` takes it
    takes: str  # int, or the choices
    meaning: str  # "" where nobody wrote it down
    usual: bool  # every method has it, with this default

    @property
    def name(self) -> str:
        """The short name: window."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class Entry:
    """Everything a user may want to know of a method."""

    name: str
    method: Method
    parts: tuple[Part, ...]
    parameters: tuple[Parameter, ...]
    presets: Mapping[str, str]  # what each changes: "window 32 → 8"
    guide: Mapping[str, str] = field(default_factory=dict)  # instead of what its parts say

    LABELS: ClassVar = ("Paper", "Code", "Ours")

    def under_label(self, label: str) -> list[str]:
        """What its parts say under one label."""
        return [part.text.labels[label] for part in self.parts if label in part.text.labels]

    def facts(self) -> list[tuple[str, str]]:
        """All that is said of it in sentences, each under a label."""
        policy, budget, unit, propagation = (part.sentences for part in self.parts)
        of_parts = [
            ("Score", policy),
            ("Budget", budget),
            ("Keeps", unit),
            ("Deeper layers read", propagation),
            ("Evicts", self.schedule),
        ]
        found = [
            ("When to use it", self.method.use),
            ("Cost", self.method.cost),
            *(self.guide.items() or of_parts),
            ("Source", self.method.source),
            *((label, said) for label in self.LABELS for said in self.under_label(label)),
        ]
        return [(label, said) for label, said in found if said]

    @property
    def schedule(self) -> str:
        """When it evicts."""
        if self.guide:
            return _LATER
        if self.method.budget.unlimited and self.method.schedule.every is None:
            return "never"
        return str(self.method.schedule)

    def record(self) -> dict[str, Any]:
        """The short record of a list, for JSON."""
        return {
            "name": self.name,
            **{new: part.name for new, part in zip(_COLUMNS, self.parts, strict=True)},
            "schedule": self.schedule,
            "source": self.method.source,
            "presets": sorted(self.presets),
            "summary": self.parts[0].text.summary,
            "use": self.method.use,
            "cost": self.method.cost,
            **({"guide": dict(self.guide)} if self.guide else {}),
        }

    def full_record(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return self.record() | {
            "parts": {
                part.kind: {"name": part.name, **vars(part.text), **part.text.labels}
                for part in self.parts
            },
            "parameters": {p.path: p.default for p in self.parameters},
            "takes": {p.path: p.takes for p in self.parameters},
            "meanings": {p.path: p.meaning for p in self.parameters},
            "preset_settings": {key: dict(value) for key, value in self.method.presets.items()},
        }


def entry(name: str) -> Entry:
    """What there is to say of a method; errors as `kvtrim.methods.settings.find`."""
    return describe(name, find(name))


def describe(name: str, method: Method) -> Entry:
    """What there is to say of a method that goes by this name."""
    kinds = ("policy", "budget", "unit", "propagation")
    if method is auto.AUTO:
        guide = auto.guide()
        summary = Text(guide["Becomes"], "", {})
        parts = [Part(kind, _LATER, summary if kind == "policy" else _SILENT) for kind in kinds]
        return Entry(name, method, tuple(parts), (), {}, guide)
    parts = [part_of(kind, type(getattr(method, kind))) for kind in kinds]
    own = [_parameter(method, *item) for item in parameters(method).items()]
    own.sort(key=lambda p: p.usual)
    presets = {key: _changes(method, find(method, preset=key)) for key in method.presets}
    return Entry(name, method, tuple(parts), tuple(own), presets)


def part_of(kind: str, owner: type) -> Part:
    """What there is to say of a policy, budget, unit or propagation."""
    return Part(kind, owner.__name__, text_of(owner))


def parameters_of(
    owner: type[Budget] | type[Unit] | type[Propagation] | type[Refit],
) -> list[Parameter]:
    """The parameters of a budget, unit, propagation or refit that is chosen by name."""
    part = owner()
    names = [field.name for field in fields(cast(Any, part))]
    return [_describe(owner, name, getattr(part, name)) for name in names]


def format_value(value: Any) -> str:
    """A parameter's value as `--set` takes it."""
    if isinstance(value, Budget):
        names = [name for name, kind in BUDGETS.items() if kind is type(value)]
        return names[0] if names else type(value).__name__
    if isinstance(value, Policy):
        names = [name for name, method in METHODS.items() if method.policy == value]
        return names[0] if names else type(value).__name__
    if value is None or value == ():
        return "none"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _parameter(method: Method, path: str, value: Any) -> Parameter:
    part, _, name = path.rpartition(".")
    owner = attrgetter(part)(method) if part else method
    found = _describe(type(owner), name, value)
    return replace(found, path=path, usual=path in _COMMON and _COMMON[path] == value)


def _describe(owner: type, name: str, value: Any) -> Parameter:
    meaning = meanings_of(owner).get(name, "")
    return Parameter(name, format_value(value), takes(owner, name), meaning, usual=False)


def _changes(method: Method, preset: Method) -> str:
    """What a preset changes, as text; "" if nothing."""
    parts = [(p, type(getattr(method, p)), type(getattr(preset, p))) for p in PARTS]
    changed = [f"{p} {a.__name__} → {b.__name__}" for p, a, b in parts if a is not b]
    before = parameters(method)
    for path, value in parameters(preset).items():
        name = path.rpartition(".")[2]
        if path not in before:
            changed.append(f"{name} {format_value(value)}")
        elif before[path] != value:
            changed.append(f"{name} {format_value(before[path])} → {format_value(value)}")
    return ", ".join(changed)
