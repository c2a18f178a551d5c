"""A run that takes more methods and budgets: only what is new is measured, then put between.

The new cells are measured into a folder within the run's, beside the full cache, which is read
again to count divergence from and not written down. What is there stays as it is until all of the
new is; then the files are made anew as one run of all cells would have ordered them. They are
moved into place one by one, the record last, which a run that was killed meanwhile goes on with.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvtrim import files, records
from kvtrim.bench.eval.grid import Grid
from kvtrim.records import INPUTS, RECORD, SAMPLES, TIMES, InputLine, Key, Line

PARTS = "parts"
_JOINED = "joined"


def base(grid: Grid, there: Line) -> Grid:
    """The part of a grid that a record says, or the grid itself if that is not some of its cells.

    Args:
        there: the record of the run that the folder holds.
    """
    known = there.get("methods")
    if not isinstance(known, list):
        return grid
    asked = json.loads(json.dumps(grid.record()["methods"]))
    cells = tuple(cell for cell, own in zip(grid.cells, asked, strict=True) if own in known)
    return replace(grid, cells=cells) if 0 < len(cells) == len(known) < len(asked) else grid


def difference(grid: Grid, base: Grid) -> Grid:
    """What is to be measured: the cells that a grid has more than its base."""
    known = {(cell.label, cell.keep) for cell in base.cells}
    new = [cell for cell in grid.cells if (cell.label, cell.keep) not in known]
    return replace(grid, cells=(grid.cells[0], *new), full_known=True)


def part(folder: Path, grid: Grid) -> Path:
    """Where the lines of new cells are gathered; other cells have another place."""
    text = json.dumps(grid.record()["methods"])
    return folder / PARTS / hashlib.sha256(text.encode()).hexdigest()[:12]


def join(
    folder: Path,
    part: Path,
    record: dict[str, Any],
    inputs: Sequence[InputLine],
    keys: Sequence[Key],
) -> None:
    """Make the files of a run and of its part those of one run.

    Args:
        record: of that one run.
        inputs: its lines, in order.
        keys: of its lines, in order.
    """
    joined = folder / PARTS / _JOINED
    shutil.rmtree(joined, ignore_errors=True)
    files.make_folder(joined)
    files.replace(joined / INPUTS, records.text_of(inputs))
    for name in (TIMES, SAMPLES):
        both = [line for place in (folder, part) for line in records.read(place, name)]
        known = {_of(line): line for line in both}
        files.replace(joined / name, records.text_of(known[_of(key)] for key in keys))
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    files.replace(joined / RECORD, text.encode())
    settle(folder)


def settle(folder: Path) -> None:
    """Move files into place that are joined and not there yet."""
    joined = folder / PARTS / _JOINED
    if not (joined / RECORD).exists():
        return
    with files.file_errors("write", folder):
        for name in (INPUTS, TIMES, SAMPLES, RECORD):
            if (joined / name).exists():
                os.replace(joined / name, folder / name)
    shutil.rmtree(folder / PARTS, ignore_errors=True)


def _of(line: Key) -> tuple[object, ...]:
    return tuple(records.key_of(line).values())
