"""Tables of head scores: the file format of HeadKV's authors, and the tables that kvtrim ships.

A table is one JSON object with a list of scores for every query head, one per sample that
counted: {"0-0": [0.1, 0.0], "0-1": ...}. A key is "layer-head", counted from 0 over the layers
that kvtrim manages. Keys are parsed, their order means nothing.

A shipped table has a record beside it (NAME.record.json) that says what it was measured on.
"""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from kvtrim import files
from kvtrim.errors import UsageError
from kvtrim.types import Float, Target, Tensor

AUTO, RANDOM = "auto", "random"
RETRIEVAL = ("reason", "copy")
"""Kinds of scores, as the records name them, that say how much a head helps to find a needle."""
SHIPPED = Path(__file__).parents[1] / "tables"
RECORD = ".record.json"
_MOST = 1_000_000  # heads of a model
HOW_TO = "kvtrim calibrate heads --model MODEL --out FILE"


def shipped_tables() -> dict[str, Path]:
    """The tables that come with kvtrim, by name."""
    files = [path for path in SHIPPED.glob("*.json") if not path.name.endswith(RECORD)]
    return {path.stem: path for path in sorted(files, key=lambda path: path.stem)}


def measured_on(identity: str | None, kinds: Sequence[str] = RETRIEVAL) -> str | None:
    """The name of the first shipped table of these kinds that was measured on these weights."""
    for name, path in shipped_tables().items():
        record = record_of(path)
        if identity is None or record.get("score", kinds[0]) not in kinds:
            continue
        if record.get("identity") == identity:
            return name
    return None


def require_readable(table: str) -> None:
    """Refuse a table that is named and cannot be read; errors as `read`."""
    if table not in (AUTO, RANDOM):
        read(table)


def table_for(table: str, target: Target, kinds: Sequence[str]) -> str:
    """The table for a model: the one that is named, or its own of one of these kinds.

    Raises:
        UsageError: none of its own, or one of other heads.
    """
    if table != AUTO:
        of(table, target.name, target.layers, target.heads)
        return table
    found = measured_on(target.identity(), kinds)
    if found is None:
        how = f"{HOW_TO} --score {kinds[0]}"
        raise UsageError(
            f"this method needs a table of head scores measured on {target.name} "
            f"({target.layers} layers of {target.heads} query heads); those that come with "
            f"kvtrim ({', '.join(shipped_tables())}) were measured on other weights. "
            f"Measure one: {how}, then pass table=FILE (--set table=FILE)"
        )
    return table_for(found, target, kinds)


def of(table: str, name: str, layers: int, heads: int) -> Float[Tensor, "L H"]:
    """The mean scores, if they are of so many layers and query heads.

    Raises:
        UsageError: they are of others, or no table was given.
    """
    if table == AUTO:
        raise UsageError(f"no table of head scores was given. Measure one: {HOW_TO}")
    if table == RANDOM:
        return random_scores(layers, heads)
    found = read(table)
    if list(found.shape) != [layers, heads]:
        raise UsageError(
            f"the head table {table} has {found.shape[0]} layers of {found.shape[1]} "
            f"query heads, {name} has {layers} of {heads}; use a table of this model. "
            f"Measure one: {HOW_TO}"
        )
    return found


def record_of(path: Path) -> dict[str, Any]:
    """What was written beside a table when it was measured; empty where nothing was."""
    beside = record_path(path)
    return files.record_of(beside) if beside.is_file() else {}


def record_path(path: Path) -> Path:
    """Where the record of a table is: table.json has table.record.json."""
    return path.with_name(path.name.removesuffix(".json") + RECORD)


def read(table: str) -> Float[Tensor, "L H"]:
    """Each query head's mean score, float64, of a shipped table's name or a file.

    Raises:
        UsageError: no such table, or a file that is none.
    """
    path = _locate(table)
    try:
        found = path.stat()
        return _read(path, found.st_mtime_ns, found.st_size)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the head table {table}: {error}") from error


def random_scores(layers: int, heads: int) -> Float[Tensor, "L H"]:
    """Random scores, the same every time: for measuring speed, which depends on none."""
    draw = torch.Generator().manual_seed(0)
    return torch.rand(layers, heads, generator=draw, dtype=torch.float64)


def write(path: Path, table: dict[str, list[float]], record: dict[str, Any]) -> None:
    """Write a table and its record; older files are replaced only once both are complete.

    Raises:
        FileError: the folder cannot be written to, or the disk is full.
    """
    content = (json.dumps(table) + "\n").encode()
    files.replace_with_record(path, content, record_path(path), record)


def _locate(table: str) -> Path:
    names = shipped_tables()
    if table in names:
        return names[table]
    path = Path(table).expanduser()
    if not path.is_file():
        raise UsageError(
            f"no head table {table!r}: neither a file nor one that comes with kvtrim "
            f"({', '.join(names)}). Measure one: {HOW_TO}"
        )
    return path


@lru_cache(maxsize=16)
def _read(path: Path, *stamp: int) -> Float[Tensor, "L H"]:
    """As `read`; the stamp is what a changed file differs in."""
    try:
        lists = files.parse(files.text_of(path))
    except ValueError as error:
        raise UsageError(f"{path} is no head table: not JSON ({error})") from error
    if not isinstance(lists, dict) or not lists:
        raise UsageError(f'{path} is no head table: expected one object {{"layer-head": [...]}}')
    means = {_key(path, key): _mean(path, key, scores) for key, scores in lists.items()}
    layers, heads = (1 + max(numbers) for numbers in zip(*means, strict=True))
    if layers * heads > _MOST:
        raise UsageError(f"the head table {path} names head {layers - 1}-{heads - 1}; none has it")
    wanted = [(layer, head) for layer in range(layers) for head in range(heads)]
    missing = [f"{layer}-{head}" for layer, head in wanted if (layer, head) not in means]
    if missing or len(means) != len(lists):
        raise UsageError(
            f"the head table {path} is incomplete: {layers} layers of {heads} heads need "
            f"{layers * heads} keys, {len(lists)} are there; missing {', '.join(missing[:5])}"
        )
    table = torch.tensor([means[at] for at in wanted], dtype=torch.float64)
    if not float(table.sum()) > 0:
        raise UsageError(f"in the head table {path} no head has a score above 0; measure it again")
    return table.view(layers, heads)


def _key(path: Path, key: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,5})-([0-9]{1,5})", key)
    if match is None:
        raise UsageError(f'{path} is no head table: a key is "layer-head", not {key!r}')
    return int(match[1]), int(match[2])


def _mean(path: Path, key: str, scores: Any) -> float:
    numbers = scores if isinstance(scores, list) else []
    good = all(isinstance(x, int | float) and 0 <= x < float("inf") for x in numbers)
    if not numbers or not good:
        raise UsageError(
            f"{path} is no head table: {key} needs a list of numbers that are not negative"
        )
    return sum(numbers) / len(numbers)
