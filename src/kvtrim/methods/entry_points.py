"""What comes from elsewhere: objects named `module:ATTRIBUTE`, and those of installed packages.

A package offers a method or a task under a name of its own in its pyproject.toml:

    [project.entry-points."kvtrim.methods"]
    longest = "toys.methods:LONGEST"

    [project.entry-points."kvtrim.tasks"]
    riddles = "toys.tasks:RIDDLES"

Only the names are read until one of them is used.
"""

import sys
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Literal, TypeVar

from kvtrim.errors import KvtrimError, UsageError

Group = Literal["kvtrim.methods", "kvtrim.tasks"]
Own = TypeVar("Own")


def import_object(name: str, kind: type[Own]) -> Own:
    """An object of the user's own, named `module:ATTRIBUTE`.

    Raises:
        UsageError: no such module or attribute, or it is of another kind.
    """
    return _load(name, kind, repr(name))


def names(group: Group) -> list[str]:
    """What installed packages offer, in alphabetical order; nothing of it is imported."""
    return sorted(_offers(group, tuple(sys.path)))


def find_offer(group: Group, name: str, kind: type[Own], builtin: Collection[str]) -> Own | None:
    """What a package offers under a name; None if none does.

    Args:
        builtin: kvtrim's own names, which no package may take.

    Raises:
        UsageError: it clashes with a name of kvtrim or of another package, cannot be imported, or
            is of another kind; says which package to ask.
    """
    offers = _offers(group, tuple(sys.path)).get(name, [])
    if not offers:
        return None
    said = " and ".join(map(_name_of, offers))
    word = kind.__name__.lower()
    if name in builtin:
        raise UsageError(
            f"{word} {name!r} comes with kvtrim, and {said} takes its name: uninstall that "
            "package, or have it choose another name"
        )
    if len(offers) > 1:
        raise UsageError(f"{said} both offer the {word} {name!r}: uninstall one of them")
    found = _load(offers[0].value, kind, f"{name!r} of {said}")
    if (own := getattr(found, "name", name)) != name:
        raise UsageError(f"{said} offers the {word} {own!r} as {name!r}; it has to be one name")
    return found


def places(group: Group, asked: Iterable[str]) -> tuple[str, ...]:
    """Those of the names that do not come with kvtrim, as `module:ATTRIBUTE`."""
    offers = _offers(group, tuple(sys.path))
    found = {name: offers[name][0].value for name in offers}
    return tuple(found.get(name, name) for name in asked if ":" in name or name in found)


@lru_cache(maxsize=8)
def _offers(group: Group, path: tuple[str, ...]) -> Mapping[str, list[EntryPoint]]:
    """Every name and who offers it; reading them takes milliseconds, so once for each path."""
    found: dict[str, list[EntryPoint]] = {}
    for one in entry_points(group=group):
        found.setdefault(one.name, []).append(one)
    return found


def _name_of(point: EntryPoint) -> str:
    package = "a package" if point.dist is None else f"{point.dist.name} {point.dist.version}"
    return f"{package} ({point.value})"


def _load(place: str, kind: type[Own], called: str) -> Own:
    module, _, attribute = place.partition(":")
    word = kind.__name__.lower()
    try:
        found = import_module(module)
        for name in attribute.split("."):
            found = getattr(found, name)
    except Exception as error:  # whatever stands in that module
        said = str(error) if isinstance(error, KvtrimError | ImportError | AttributeError) else ""
        said = said or f"{type(error).__name__}: {error}"
        raise UsageError(f"cannot load {word} {called}: {said}") from error
    if not isinstance(found, kind):
        raise UsageError(f"{called} is a {type(found).__name__}, not a kvtrim {kind.__name__}")
    return found
