"""`methods`: what there is, and one method in detail."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtrim.cli import options, output
from kvtrim.errors import UsageError

if TYPE_CHECKING:
    from kvtrim.methods.describe.entries import Entry

Name = Annotated[str | None, typer.Argument(help="Explain this method.")]
_SHORT = {"When to use it": "use", "Deeper layers read": "reads"}  # labels in a terminal
Markdown = Annotated[bool, typer.Option("--markdown", help="Print the page of docs/methods.md.")]


def methods(name: Name = None, json: options.Json = False, markdown: Markdown = False) -> None:
    """List the methods, those of installed packages too, or explain one."""
    from kvtrim.methods.describe.entries import entry
    from kvtrim.methods.describe.markdown import manual, section

    if json and markdown:
        raise UsageError("--json and --markdown: choose one")
    if markdown:
        typer.echo(manual() if name is None else section(entry(name)), nl=False)
    elif name is not None:
        _explain(entry(name), json)
    else:
        _list(json)


def _list(json: bool) -> None:
    """Every method that can be described; those of packages that cannot are named at the end."""
    from kvtrim.methods.describe.entries import entry
    from kvtrim.methods.settings import names

    records, broken = [], []
    for name in names():
        try:
            records.append(entry(name).record())
        except UsageError as error:  # of whoever wrote that package
            broken.append(str(error))
    if json:
        output.print_json(records)
    else:
        _print_list(records)
    if broken:
        raise UsageError("; ".join(broken))


def _print_list(records: list[dict[str, Any]]) -> None:
    headings = ("name", "scores by", "budget", "evicts", "propagation", "source")
    keys = ("name", "scorer", "budget", "schedule", "propagation", "source")
    rows = [[record[key] for key in keys] for record in records]
    output.table("kvtrim methods", output.Cells.texts(headings, rows))
    output.out.print("kvtrim methods NAME explains one", highlight=False)


def _explain(e: "Entry", json: bool) -> None:
    if json:
        output.print_json(e.full_record())
        return
    output.out.print(e.name, style="bold")
    output.facts([(_SHORT.get(label, label.lower()), said) for label, said in e.facts()])
    columns = ("name", "default", "takes", "meaning")
    rows = [[p.name, p.default, p.takes, p.meaning] for p in e.parameters]
    if rows:
        output.table("parameters (--set name=value)", output.Cells.texts(columns, rows))
    if e.presets:
        presets = [[name, changes or "nothing"] for name, changes in e.presets.items()]
        changed = output.Cells.texts(("name", "changes"), presets)
        output.table("presets (--set preset=NAME)", changed)
