"""`caches`: the library of named documents: list, verify, rename, prune, remove."""

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from kvtrim.cli import options, output
from kvtrim.errors import CacheError

if TYPE_CHECKING:
    from kvtrim.serve.library import Entry

group = typer.Typer(
    help="List, verify, rename, prune and remove the named documents of `compress --name`.",
    invoke_without_command=True,
    add_completion=False,
)
Named = Annotated[str, typer.Argument(help="A name, with or without @.")]
Names = Annotated[list[str] | None, typer.Argument(help="Names. Default: all of them.")]
Size = Annotated[str, typer.Argument(help="What may stay on the disk: 2GiB, 500MiB.")]


@group.callback()
def caches(
    context: typer.Context, library: options.Library = None, json: options.Json = False
) -> None:
    """List the named documents: what they are of, what they take, when they were used."""
    context.obj = library
    if context.invoked_subcommand is not None:
        return
    own = options.library_in(library)
    entries, damaged = own.entries()
    for what in damaged:
        output.note(what)
    if json:
        output.print_json([_record(entry) for entry in entries])
        return
    columns = [("name", "left"), ("model", "left"), ("method", "left")]
    columns += [(name, "right") for name in ("keep", "tokens", "held", "of full", "on disk")]
    columns += [("made", "left"), ("last used", "left")]
    rows = [
        [
            f"@{entry.name}",
            entry.model,
            entry.method,
            entry.keep,
            f"{entry.tokens:,}",
            output.size(entry.held_bytes),
            f"{100 * entry.held_bytes / entry.full_bytes:.1f}%",
            output.size(entry.file_bytes),
            _day(entry.made),
            _day(entry.used),
        ]
        for entry in entries
    ]
    if not rows:
        output.out.print(
            f"no documents in {own.folder}; kvtrim compress FILE --name NAME adds one"
        )
        return
    count = "1 document" if len(rows) == 1 else f"{len(rows)} documents"
    output.table(f"{count} in {own.folder}", output.Cells(columns, rows), wide=True)


@group.command()
def verify(context: typer.Context, names: Names = None) -> None:
    """Read every byte and compare it with what was written; exit code 1 if anything differs."""
    from kvtrim.serve import documents

    own = options.library_in(context.obj)
    entries, damaged = own.entries()
    if names:
        entries, damaged = [own.get(_plain(name)) for name in names], []
    for entry in entries:
        wrong = documents.verify(own, entry)
        if wrong and entry.key not in {each.key for each in own.entries()[0]}:
            output.out.print(f"@{entry.name}: was removed meanwhile")
            continue
        output.out.print(f"@{entry.name}: {wrong or 'as it was written'}")
        damaged += [f"@{entry.name}"] if wrong else []
    if damaged:
        raise CacheError(f"damaged: {'; '.join(damaged)}; compress those texts again")


@group.command()
def rename(context: typer.Context, old: Named, new: Named) -> None:
    """Give a document another name."""
    options.library_in(context.obj).rename(_plain(old), _plain(new))


@group.command()
def remove(context: typer.Context, names: Annotated[list[str], typer.Argument()]) -> None:
    """Remove documents."""
    own = options.library_in(context.obj)
    for name in names:
        own.get(_plain(name))
    for name in names:
        own.remove(_plain(name))


@group.command()
def prune(context: typer.Context, size: Size) -> None:
    """Remove those not used for longest until the others take no more than SIZE."""
    most = options.parse_size(size, f"{size} is no size; write 2GiB or 500MiB")
    for entry in options.library_in(context.obj).prune(most):
        output.out.print(f"@{entry.name} removed: {output.size(entry.file_bytes)}")


def _plain(name: str) -> str:
    return name.removeprefix("@")


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def _record(entry: "Entry") -> dict[str, object]:
    return dict(vars(entry))
