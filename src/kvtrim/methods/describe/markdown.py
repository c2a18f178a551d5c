"""docs/methods.md: every method of the registry as Markdown."""

import re
from collections.abc import Mapping

from kvtrim.methods import auto
from kvtrim.methods.budgets import BUDGETS, Budget
from kvtrim.methods.describe.entries import (
    Entry,
    Parameter,
    describe,
    entry,
    parameters_of,
    part_of,
)
from kvtrim.methods.method import Method
from kvtrim.methods.policies.full import Full
from kvtrim.methods.propagation import PROPAGATIONS, Propagation
from kvtrim.methods.refit import LeastSquares, Refit, Unchanged
from kvtrim.methods.registry import METHODS
from kvtrim.methods.settings import UNITS
from kvtrim.methods.unit import Unit
from kvtrim.report.format import Cells

_HEAD = """# Methods

<!-- Written by `make docs` from the registry and the docstrings: edits here are lost. -->

A method is a policy that scores, a budget that counts, a unit that is kept as a whole, a schedule
that says when, a propagation that says what deeper layers read, and a refit that says what kept
entries become. `kvtrim methods NAME` prints one of these sections. A parameter is set with
`--set name=value` or as a keyword, a preset with `--set preset=NAME`.
"""
_COLUMNS = ("method", "scores by", "budget", "evicts", "propagation", "source")
_KEYS = ("scorer", "budget", "schedule", "propagation")
_PARAMETER = ("parameter", "default", "takes", "meaning")


def manual() -> str:
    """The whole file."""
    entries = [entry(name) for name in METHODS]
    rows = [
        [f"[{e.name}](#{e.name})", *(e.record()[key] for key in _KEYS), _link(e.method.source)]
        for e in entries
    ]
    usual = [p for p in describe("", Method(Full())).parameters if p.usual]
    return "\n".join(
        [
            _HEAD,
            Cells.texts(_COLUMNS, rows).markup(),
            section(entry(auto.NAME)),
            *(section(e) for e in entries),
            "## Parameters of every method\n",
            Cells.texts(_PARAMETER, map(_row, usual)).markup(),
            *_choices("Budgets", "budget", BUDGETS),
            *_choices("Units", "unit", UNITS),
            *_choices("Propagations", "propagation", PROPAGATIONS),
            *_choices("Refits", "refit", {"none": Unchanged, "values": LeastSquares}),
            "`refit=values+bias` is `values` with `bias`.\n",
        ]
    )


def section(e: Entry) -> str:
    """One method."""
    said_of_it = "".join(f"- **{label}.** {_link(said)}\n" for label, said in e.facts())
    pieces = [f"## {e.name}\n", said_of_it]
    own = [p for p in e.parameters if not p.usual]
    if own:
        pieces.append(Cells.texts(_PARAMETER, map(_row, own)).markup())
    if e.presets:
        rows = [[f"`{name}`", changes or "nothing"] for name, changes in e.presets.items()]
        pieces.append(Cells.texts(("preset", "changes"), rows).markup())
    return "\n".join(pieces)


def _choices(
    title: str,
    part: str,
    table: Mapping[str, type[Budget]]
    | Mapping[str, type[Unit]]
    | Mapping[str, type[Propagation]]
    | Mapping[str, type[Refit]],
) -> list[str]:
    """Every budget, unit, propagation or refit that can be chosen by name, with its parameters."""
    pieces = [f"## {title}\n", f"`--set {part}=NAME` gives a method another one.\n"]
    for name, owner in table.items():
        said = part_of(part, owner).sentences
        pieces += [f"**{name}**: {said}\n"]
        own = parameters_of(owner)
        if own:
            pieces.append(Cells.texts(_PARAMETER, map(_row, own)).markup())
    return pieces


def _row(parameter: Parameter) -> list[str]:
    return [f"`{parameter.name}`", f"`{parameter.default}`", parameter.takes, parameter.meaning]


def _link(said: str) -> str:
    """Papers and pages of docs/ as links."""
    said = re.sub(r"arXiv ([\d.]+)", r"[arXiv \1](https://arxiv.org/abs/\1)", said)
    return re.sub(r"docs/(\w+\.md)", r"[\1](\1)", said)
