"""`papers`: the tables and figures of papers, run on any model, drawn beside what they print."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtrim.cli import options, output
from kvtrim.cli import speed as timing
from kvtrim.cli.eval import AllowCode, Data, Unconfined
from kvtrim.cli.sweep import Address, UseRay, Workers, make_pool
from kvtrim.errors import UsageError

if TYPE_CHECKING:
    from kvtrim.papers.recipe import Recipe

group = typer.Typer(
    help="The tables and figures of five papers: list, run, draw.",
    invoke_without_command=True,
    rich_markup_mode=None,
)
Name = Annotated[
    str, typer.Argument(help="A name of `kvtrim papers`, for example curdkv/table-2.")
]
Markdown = Annotated[bool, typer.Option("--markdown", help="As docs/papers.md.")]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", "-m", help="As in `ask`; repeat for several. Default: the paper's."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Samples of a task. Default: the paper's.")]
Lengths = Annotated[
    list[int] | None,
    typer.Option("--length", min=64, help="Other lengths than the paper's; repeat for several."),
]
NewTokens = Annotated[
    int | None, typer.Option(min=1, help="Bound of answers. Default: the paper's.")
]
Keeps = Annotated[
    list[str] | None, typer.Option("--keep", help="Only these of its budgets; repeat for several.")
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        help="Only these of its tasks (or variants: longgenbench-gsm8k-5); repeat for several.",
    ),
]
Repeats = Annotated[int, typer.Option(min=1, help="Counted rounds, where seconds are measured.")]
OutFolder = Annotated[
    Path,
    typer.Option("--out", "-o", help="A folder; the same command goes on where it was cut off."),
]
Folder = Annotated[
    Path | None,
    typer.Argument(help="The --out folder of its run. Default: what the paper prints."),
]

_OF_ANSWERS = ("data", "limit", "workers", "ray", "ray_address")
_OF_ANSWERS += ("allow_code_execution", "unconfined")


@group.callback()
def papers(context: typer.Context, markdown: Markdown = False, json: options.Json = False) -> None:
    """List every table and figure: what runs it, what it needs, hours on one large GPU (a guess).

    `kvtrim papers run NAME --out DIR` measures one, `kvtrim papers show NAME DIR` draws it.
    """
    if context.invoked_subcommand is not None:
        return
    from kvtrim.papers.recipe import recipes

    known = recipes()
    if markdown:
        from kvtrim.report.papers_manual import manual

        typer.echo(manual(), nl=False)
        return
    if json:
        output.print_json([_to_record(one) for one in known])
        return
    columns = [("name", "left"), ("what", "left"), ("needs", "left"), ("hours", "right")]
    columns += [("command", "left")]
    rows = [
        [one.name, one.about, one.needs, _hours(one), one.command or one.reason] for one in known
    ]
    output.table("Tables and figures", output.Cells(columns, rows), wide=True)


def _to_record(one: "Recipe") -> dict[str, Any]:
    return {
        "name": one.name,
        "kind": one.kind,
        "about": one.about,
        "needs": one.needs,
        "hours": round(one.hours, 1) if one.command else None,
        "command": one.command,
        "reason": one.reason,
        "models": dict(one.models),
        "methods": dict(one.methods),
        "keeps": list(one.keeps),
    }


def _hours(one: "Recipe") -> str:
    return f"{one.hours:.1f}" if one.kind in ("eval", "speed") else "-"


@group.command()
def run(
    context: typer.Context,
    name: Name,
    out: OutFolder,
    model: Models = None,
    data: Data = None,
    limit: Limit = None,
    length: Lengths = None,
    keep: Keeps = None,
    task: Tasks = None,
    max_new_tokens: NewTokens = None,
    repeats: Repeats = 3,
    config: timing.Config = None,
    workers: Workers = None,
    ray: UseRay = False,
    ray_address: Address = None,
    allow_code_execution: AllowCode = False,
    unconfined: Unconfined = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
) -> None:
    """Measure a table or figure: with the paper's methods, budgets, prompts and protocol.

    Whatever is asked for otherwise is recorded, and `kvtrim papers show` says it.
    """
    from kvtrim.papers import recipe as known

    found = known.find(name)
    known.require_run(found)
    options.require_folder(out)
    keeps, tasks = _keeps(found, keep), _tasks(found, task)
    model = model and list(dict.fromkeys(model))
    _require_used(context, found)
    if found.kind == "speed":
        given = [*found.methods.values()]
        where = {"device": device, "dtype": dtype, "threads": threads}
        models = model or (["run"] if config else [*found.models.values()])
        for each, place in zip(models, _places(out, models, model is not None), strict=True):
            timing.speed(
                length=length or [*found.lengths],
                method=given,
                keep=keeps,
                new_tokens=max_new_tokens or found.new_tokens,
                repeats=repeats,
                model=None if config and not model else each,
                config=config,
                out=place,
                **where,
            )
        return
    changed = {"limit": limit, "lengths": length, "max_new_tokens": max_new_tokens}
    changed |= {"tasks": tasks}
    own = {"device": device, "dtype": dtype, "threads": threads, "data": data and str(data)}
    models = model or [*found.models.values()]
    for each, place in zip(models, _places(out, models, model is not None), strict=True):
        asked = found.sweep(known.paper_model(found, each), **changed) | {"keeps": keeps}
        asked |= {"models": [each], **{key: value for key, value in own.items() if value}}
        how = workers, ray or ray_address is not None, ray_address
        _sweep(asked, name, place, how, allow_code_execution, unconfined)


def _require_used(context: typer.Context, found: "Recipe") -> None:
    """Refuse options that what is measured cannot act on."""
    if found.kind == "speed":
        why = f"changes nothing in {found.name}, which measures seconds and bytes; leave it out"
        options.require_unset(context, _OF_ANSWERS, why)
        return
    why = f"has random weights, and {found.name} measures answers: use --model"
    options.require_unset(context, ("config",), why)
    why = f"counts rounds of seconds, and {found.name} measures answers; leave it out"
    options.require_unset(context, ("repeats",), why)


def _keeps(found: "Recipe", keep: list[str] | None) -> list[str]:
    """The budgets, or those of them that were asked for."""
    other = [each for each in keep or [] if each not in found.keeps]
    if other:
        raise UsageError(f"--keep {other[0]}: {found.name} has {', '.join(found.keeps)}")
    return keep or [*found.keeps]


def _tasks(found: "Recipe", task: list[str] | None) -> list[str] | None:
    """Those of the tasks that were asked for; None for all of them."""
    from kvtrim.tasks import TASKS

    known = _all_tasks(found)
    variants = {name for name in TASKS for own in known if name.startswith(f"{own}-")}
    other = [each for each in task or [] if each not in {*known, *variants}]
    if other:
        has = ", ".join(known) or "none: it measures seconds and bytes"
        raise UsageError(f"--task {other[0]}: {found.name} has {has}")
    return task


def _all_tasks(found: "Recipe") -> list[str]:
    """Every task of a recipe, one by one."""
    from kvtrim.tasks import find_tasks

    return [each.name for each in find_tasks(found.tasks)]


def _places(out: Path, models: Sequence[str], named: bool) -> list[Path]:
    """The folder for the one model that was named, else one of its own for each."""
    from kvtrim import files

    if named and len(models) == 1:
        return [out]
    files.make_folder(out, parents=True)
    short = [model.strip("/").rpartition("/")[2].lower() for model in models]
    whole = [model.strip("/").replace("/", "-").lower() for model in models]
    return [
        out / (own if short.count(own) == 1 else other)
        for own, other in zip(short, whole, strict=True)
    ]


def _sweep(
    asked: dict[str, Any],
    name: str,
    out: Path,
    how: tuple[int | None, bool, str | None],
    allow_code_execution: bool,
    unconfined: bool,
) -> None:
    from kvtrim.bench.eval import scores
    from kvtrim.bench.sweep.queue import Driver
    from kvtrim.bench.sweep.spec import settle

    made = settle(asked, name, Path())
    grid = made.jobs()[0].grid()
    scores.require_programs(grid.tasks, allow_code_execution, unconfined)
    pool = make_pool(made, *how)
    with output.progress(left=True) as report:
        Driver(made, out, pool, allow_code_execution, unconfined, report).run()
    output.out.print(f"{out}: draw it with `kvtrim papers show {name} {out}`", highlight=False)


@group.command()
def show(name: Name, folder: Folder = None, json: options.Json = False) -> None:
    """Draw a table in the paper's shape, published figures below ours where settings are the same.

    Below the table: in what the run is not the paper's. Without a folder: what the paper prints.
    """
    from kvtrim.papers import recipe as known
    from kvtrim.report import papers as report
    from kvtrim.report import results

    found = known.find(name)
    if found.kind in ("analyze", "reason"):
        known.require_run(found)
    if folder is None:
        drawn = [report.Drawn(table, ()) for table in report.tables_in_print(found)]
        if not drawn:
            raise UsageError(f"nothing printed of {name} is at hand; name the folder of a run")
    else:
        drawn = report.draw(found, *results.read_results([folder]), tasks=_all_tasks(found))
        if not drawn:
            raise UsageError(
                f"{folder} holds no run of {name}: name another folder, or measure it with "
                f"{found.command}"
            )
    if json:
        output.print_json([_to_json(one) for one in drawn])
        return
    for one in drawn:
        output.table(one.table.title, one.table.cells, wide=True)
        output.lines([one.table.about, *(f"differs: {line}" for line in one.differences)])


def _to_json(one: Any) -> dict[str, Any]:
    cells = one.table.cells
    own = {"title": one.table.title, "about": one.table.about, "columns": cells.headings}
    own |= {"rows": list(cells.rows)}
    return own | {"differences": list(one.differences)}
