"""`sweep`: the grid of `eval` from a file, over processes, GPUs and machines."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtrim.cli import options, output
from kvtrim.cli.eval import AllowCode, Unconfined
from kvtrim.records.spec import SHARED

if TYPE_CHECKING:
    from kvtrim.bench.sweep.queue import Pool
    from kvtrim.bench.sweep.spec import Sweep

File = Annotated[
    Path,
    typer.Argument(
        help="A TOML file: lists models, tasks, methods, keeps, protocols, lengths; and "
        f"{', '.join(SHARED)}, data, device, dtype, threads, gpus, chunk, retries, [set]. See "
        "docs/evaluation.md."
    ),
]
OutFolder = Annotated[
    Path,
    typer.Option(
        "--out",
        "-o",
        help="A folder: one folder in it for each model, protocol and length, as `eval` writes "
        "them. A sweep that was cut off goes on where it stopped when asked for again.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Processes. Default: one for each GPU; without GPUs one."),
]
UseRay = Annotated[
    bool, typer.Option("--ray", help="Workers on Ray instead of processes (extra: ray).")
]
Address = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        help="A running Ray cluster: auto, or ray://host:10001. Default: a new one, here.",
    ),
]


def sweep(
    file: File,
    out: OutFolder,
    workers: Workers = None,
    ray: UseRay = False,
    ray_address: Address = None,
    allow_code_execution: AllowCode = False,
    unconfined: Unconfined = False,
    json: options.Json = False,
) -> None:
    """Evaluate models x tasks x methods x budgets x protocols with many workers.

    The files come out as one `kvtrim eval` after the other would have written them.
    """
    from kvtrim.bench.eval import scores
    from kvtrim.bench.sweep.queue import Driver
    from kvtrim.bench.sweep.spec import load

    asked = load(file)
    options.require_folder(out)
    scores.require_programs(asked.jobs()[0].grid().tasks, allow_code_execution, unconfined)
    pool = make_pool(asked, workers, ray or ray_address is not None, ray_address)
    with output.progress(left=True) as report:
        folders = Driver(asked, out, pool, allow_code_execution, unconfined, report).run()
    _show(folders, json)


def make_pool(asked: "Sweep", workers: int | None, ray: bool, address: str | None) -> "Pool":
    """The workers asked for: processes here, or actors of a Ray cluster."""
    if ray:
        from kvtrim.bench.sweep.pool_ray import RayPool

        pool = RayPool(address, workers, asked.threads, asked.gpus)
        if workers and pool.size < workers:
            output.note(f"the cluster has room for {pool.size} of {workers} workers; so many run")
        return pool
    from kvtrim.bench.sweep.pool_local import LocalPool

    return LocalPool(workers, asked.gpus)


def _show(folders: list[Path], json: bool) -> None:
    """The table of every job."""
    import json as library

    from kvtrim.bench.eval import scores

    tables: dict[str, Any] = {
        folder.name: library.loads((folder / scores.TABLE).read_text("utf-8"))
        for folder in folders
    }
    for name, made in tables.items():
        met = {row["task"] for row in made["rows"]}
        if empty := [task for task in made["tasks"] if task not in met]:
            output.note(f"{name}: no samples of {', '.join(empty)}{_why(made)}")
    if json:
        output.print_json(tables)
        return
    for name, made in tables.items():
        output.table(name, scores.cells(made["rows"]), wide=True)
        output.lines(made["refused"])


def _why(record: dict[str, Any]) -> str:
    fitting = "; with fitting = true those that would have to be cut are left out"
    return fitting if record.get("fitting") else ""
