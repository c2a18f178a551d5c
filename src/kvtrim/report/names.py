"""Names of a report that no two things share: of models, chapters, tables and pictures."""

import re
from collections.abc import Iterable

_ODD = re.compile(r"[^\w.+=%:,-]+|-{2,}(?=>)")  # what no marker, file name or link can hold


def plain(name: str) -> str:
    """A name as the end of a link: lower case, - for all that is no letter or digit."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class Names:
    """Gives names, and none of them twice."""

    def __init__(self) -> None:
        self._met: set[str] = set()

    def new(self, *choices: str) -> str:
        """The first of the choices that is free; the last one with a number if none is."""
        for name in choices:
            if plain(name) not in self._met:
                break
        else:
            number = 2
            while plain(f"{choices[-1]} {number}") in self._met:
                number += 1
            name = f"{choices[-1]} {number}"
        self._met.add(plain(name))
        return name


def short(models: Iterable[str]) -> dict[str, str]:
    """Models by the last part of their path, with as much of the path as tells them apart."""
    wanted = list(dict.fromkeys(models))
    parts = {model: model.strip("/").split("/") for model in wanted}
    names = Names()
    found = {}
    for model in wanted:
        others = [plain(parts[other][-1]) for other in wanted if other != model]
        own = parts[model]
        depth = len(own) if plain(own[-1]) in others else 1
        for few in range(depth, 0, -1):
            ends = [plain("-".join(parts[o][-few:])) for o in wanted if o != model]
            if plain("-".join(own[-few:])) not in ends:
                depth = few
        found[model] = _ODD.sub("-", names.new("-".join(own[-depth:])))
    return found
