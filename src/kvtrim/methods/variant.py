"""A method with parameters of its own, in one piece of text: `snapkv:preset=kvf,window=16`.

So one run may hold several variants of one method. The text is taken wherever a method is named,
and written into records as the variant's label: whatever a label says can be asked for again.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvtrim.errors import UsageError

_FORM = "NAME:parameter=value,parameter=value, for example snapkv:preset=kvf,window=16"
_TEXT = re.compile(r"(?P<name>[^=]*?)(?::(?P<settings>\s*[\w.]+\s*=.*))?", re.DOTALL)
_SETTING = re.compile(r"\s*([\w.]+)\s*=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Variant:
    """A method's name and the parameters that it is to have, as they were given."""

    name: str  # of the registry, of an installed package, or module:ATTRIBUTE
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Variant":
        """Read a name, or a name with parameters behind a colon.

        A comma separates parameters; what stands behind one without an equals sign goes on with
        the value before it, so that `skip_layers=0,1,window=8` sets two parameters.

        Raises:
            UsageError: no name, a parameter twice, or what is no parameter.
        """
        match = _TEXT.fullmatch(text.strip())
        if match is None or not match["name"]:
            raise UsageError(f"{text!r} names no method with its parameters: write {_FORM}")
        settings: dict[str, str] = {}
        last = ""
        for part in (match["settings"] or "").split(",") if match["settings"] else []:
            own = _SETTING.fullmatch(part)
            if own is None:
                settings[last] += f",{part.strip()}"
                continue
            last = own[1]
            if last in settings:
                raise UsageError(f"{text}: {last} is given twice; give it once")
            settings[last] = own[2].strip()
        return cls(match["name"], settings)

    def merge(self, more: Mapping[str, Any]) -> dict[str, Any]:
        """Its parameters and others.

        Raises:
            UsageError: one that both have.
        """
        for name in more:
            if name in self.settings:
                raise UsageError(f"{self}: {name} is given twice; give it once")
        return {**self.settings, **more}

    def __str__(self) -> str:
        """The label: the preset first, then by name, so that one variant has one label."""
        order = sorted(self.settings, key=lambda name: (name != "preset", name))
        own = ",".join(f"{name}={_format(self.settings[name])}" for name in order)
        return f"{self.name}:{own}" if own else self.name


def _format(value: Any) -> str:
    """A value as text that is read as the same value."""
    if isinstance(value, tuple | list):
        return ",".join(map(_format, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
