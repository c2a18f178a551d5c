"""`methods`: what there is, and one method in detail."""

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtrim.cli import options, output

if TYPE_CHECKING:
    from kvtrim.methods import Method

Name = Annotated[str | None, typer.Argument(help="Explain this method.")]


def methods(name: Name = None, json: options.Json = False) -> None:
    """List the methods, or explain one."""
    from kvtrim.methods import METHODS
    from kvtrim.settings import find

    if name is not None:
        _explain(name, find(name), json)
        return
    records = [_record(key, method) for key, method in METHODS.items()]
    if json:
        output.print_json(records)
        return
    columns = [
        (heading, "left") for heading in ("name", "scores by", "budget", "evicts", "source")
    ]
    rows = [[r["name"], r["scorer"], r["budget"], r["schedule"], r["source"]] for r in records]
    output.table("kvtrim methods", columns, rows)


def _record(name: str, method: "Method") -> dict[str, Any]:
    return {
        "name": name,
        "scorer": type(method.policy).__name__,
        "budget": type(method.budget).__name__,
        "schedule": "never" if method.budget.unlimited else str(method.schedule),
        "unit": type(method.unit).__name__.lower(),
        "propagation": "all tokens",
        "source": method.source,
        "presets": sorted(method.presets),
        "summary": _about(method).splitlines()[0],
    }


def _explain(name: str, method: "Method", json: bool) -> None:
    from kvtrim.settings import parameters

    values = parameters(method)
    record = _record(name, method) | {
        "about": _about(method),
        "parameters": {key: str(value) for key, value in values.items()},
        "preset_settings": {key: dict(value) for key, value in method.presets.items()},
    }
    if json:
        output.print_json(record)
        return
    output.out.print(f"[bold]{name}[/bold]", highlight=False)
    output.out.print(record["about"], markup=False, highlight=False)
    shown = [[key.rpartition(".")[2], str(value), key] for key, value in values.items()]
    output.table(
        "parameters (--set name=value)",
        [("name", "left"), ("value", "left"), ("full name", "left")],
        shown,
    )
    if method.presets:
        presets = [
            [key, ", ".join(f"{k}={v}" for k, v in value.items()) or "as it is"]
            for key, value in method.presets.items()
        ]
        output.table("presets (--set preset=NAME)", [("name", "left"), ("sets", "left")], presets)


def _about(method: "Method") -> str:
    """The docstrings of the policy's file and of a published budget's: what it does, paper, code,
    differences.
    """
    parts = (method.policy, method.budget)
    told = [inspect.cleandoc(inspect.getmodule(type(part)).__doc__ or "") for part in parts]
    return "\n\n".join([told[0], *(text for text in told[1:] if "Paper:" in text)])
