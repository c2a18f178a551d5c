"""Whether tables in documents are what the data say; writing them there.

A table of a document stands between `<!-- kvtrim:table NAME -->` and `<!-- /kvtrim:table -->`.
NAME is a table's name or parts of it that no other table has (question-agnostic/ruler). Behind the
name rows can be chosen: `method=snapkv,adakv keep=256,512`.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from kvtrim import files
from kvtrim.errors import FileError, UnknownNameError, UsageError
from kvtrim.report import html
from kvtrim.report.document import Chapter
from kvtrim.report.results import Run
from kvtrim.report.tables import Table

_START = re.compile(r"<!-- kvtrim:table (?P<name>\S+)(?P<only>(?: [\w-]+=\S+)*) -->")
_END = "<!-- /kvtrim:table -->"
_MARKER = re.compile(r"<!--\s*/?kvtrim:table")
_SCORE, _CLOSE = '"score":', 1e-9
_RULE = re.compile(r":?-+:?")


@dataclass(frozen=True)
class Finding:
    """Something that disagrees with the data."""

    path: Path
    line: int
    said: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.said}"


@dataclass(frozen=True)
class _Place:
    """Where a table stands in a document: its first and last line, numbered from 0."""

    name: str
    only: str
    first: int
    last: int


def pages(folder: Path, chapters: Sequence[Chapter], markdown: str) -> list[Finding]:
    """What disagrees with the data in a folder's report.md and report.html."""
    path, other = folder / "report.md", folder / "report.html"
    if not path.exists():
        return [Finding(path, 1, "there is no such file; make it with kvtrim report")]
    there, here = _text(path).split("\n"), markdown.split("\n")
    found = []
    for number in range(max(len(there), len(here))):
        lines = [one[number] if number < len(one) else "(nothing)" for one in (there, here)]
        if lines[0] != lines[1]:
            found = [Finding(path, number + 1, _differ(*lines))]
            break
    if other.exists():
        wanted = f'<meta name="{html.DIGEST}" content="{html.digest(chapters)}">'
        if wanted not in _text(other)[:1000]:
            found.append(Finding(other, 1, "it was made of other data; run kvtrim report again"))
    return found


def averages(run: Run) -> list[Finding]:
    """What disagrees with the lines in the means that `kvtrim eval` wrote into eval.json."""
    path = run.folder / "eval.json"
    if not path.exists():
        return []
    text, written = _text(path), files.record_of(path)
    places = [n for n, line in enumerate(text.split("\n"), 1) if line.lstrip().startswith(_SCORE)]
    means: dict[tuple[str, ...], list[float]] = {}
    for line in run.lines:
        own = means.setdefault((line.task, line.method.partition(" ")[0], line.keep), [])
        own += [] if line.score is None else [line.score]
    found = []
    for place, row in zip(places, _rows(path, written), strict=False):
        own = means.get((row["task"], row["method"], row["keep"]), [])
        mean = fmean(own) if own else None
        if not row["group"] and not _same(row["score"], mean):
            what = f"{row['method']} {row['keep']} on {row['task']}"
            found.append(Finding(path, place, f"{what}: score {row['score']} there, {mean} here"))
    return found


def _rows(path: Path, written: dict[str, Any]) -> list[dict[str, Any]]:
    rows = written.get("rows")
    needed = {"task", "method", "keep", "group", "score"}
    if not isinstance(rows, list) or not all(
        isinstance(r, dict) and needed <= r.keys() for r in rows
    ):
        raise FileError("read", path, "it has no rows as kvtrim eval writes them")
    return rows


def _same(there: float | None, here: float | None) -> bool:
    return there == here if there is None or here is None else abs(there - here) < _CLOSE


def document(path: Path, tables: Sequence[Table]) -> list[Finding]:
    """What disagrees with the data in a document's marked tables."""
    lines = _text(path).split("\n")
    try:
        places = list(_places(path, lines))
        found = [finding for place in places for finding in _wrong(path, lines, place, tables)]
    except _Broken as error:
        return [error.finding]
    if not places:
        return [Finding(path, 1, "it has no tables between kvtrim:table markers")]
    return found


def fill(path: Path, tables: Sequence[Table]) -> str:
    """A document with its marked tables made anew.

    Raises:
        UsageError: a marker that is not closed, or names no table.
    """
    lines = _text(path).split("\n")
    made, at = [], 0
    try:
        for place in _places(path, lines):
            made += lines[at : place.first + 1]
            made += ["", *find_table(place.name, place.only, tables).cells.markdown().split("\n")]
            at = place.last
    except _Broken as error:
        raise UsageError(str(error.finding)) from None
    return "\n".join([*made, *lines[at:]])


def find_table(name: str, only: str, tables: Sequence[Table]) -> Table:
    """The table that a marker means.

    Raises:
        UnknownNameError: there is none.
        UsageError: there are several.
    """
    found = [table for table in tables if table.name == name]
    found = found or [table for table in tables if _means(name, table.name)]
    if not found:
        raise UnknownNameError("table", name, [table.name for table in tables])
    if len(found) > 1:
        raise UsageError(f"{name} may be {' or '.join(table.name for table in found)}")
    pairs = (pair.partition("=") for pair in only.split())
    return found[0].only({heading: values.split(",") for heading, _, values in pairs})


def _means(name: str, whole: str) -> bool:
    """Whether a name's parts stand in the whole name in this order, the last one at its end."""
    parts, rest = name.split("/"), iter(whole.split("/"))
    return parts[-1] == whole.rpartition("/")[2] and all(part in rest for part in parts)


class _Broken(Exception):
    """A document whose markers cannot be read."""

    def __init__(self, finding: Finding):
        self.finding = finding
        super().__init__(str(finding))


def _places(path: Path, lines: Sequence[str]) -> Iterator[_Place]:
    begun: tuple[re.Match[str], int] | None = None
    for number, line in enumerate(lines):
        start = _START.fullmatch(line.strip())
        if start and begun is None:
            begun = start, number
        elif line.strip() == _END and begun is not None:
            yield _Place(begun[0]["name"], begun[0]["only"], begun[1], number)
            begun = None
        elif _MARKER.search(line):
            raise _Broken(
                Finding(path, number + 1, f"this marker is out of place: {line.strip()}")
            )
    if begun is not None:
        raise _Broken(Finding(path, begun[1] + 1, f"this table is not closed with {_END}"))


def _wrong(
    path: Path, lines: Sequence[str], place: _Place, tables: Sequence[Table]
) -> Iterator[Finding]:
    """The first line of a table that is not what the data say."""
    try:
        table = find_table(place.name, place.only, tables)
    except UsageError as error:
        yield Finding(path, place.first + 1, str(error))
        return
    wanted = table.cells.markdown().strip().split("\n")
    there = [n for n in range(place.first + 1, place.last) if lines[n].strip()]
    for n, line in zip(there, wanted, strict=False):
        if _cells(lines[n]) != _cells(line):
            yield Finding(path, n + 1, _differ(lines[n], line))
            return
    if len(there) != len(wanted):
        said = f"{place.name}: {len(there)} lines there, {len(wanted)} in the data"
        yield Finding(path, place.last + 1, said)


def _cells(line: str) -> list[str]:
    cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
    return ["---" if _RULE.fullmatch(cell) else cell for cell in cells]


def _differ(there: str, here: str) -> str:
    return f"the file says {there.strip()!r}, the data say {here.strip()!r}"


def _text(path: Path) -> str:
    try:
        return files.text_of(path)
    except FileError as error:
        raise UsageError(str(error)) from None


def all_tables(chapters: Sequence[Chapter]) -> list[Table]:
    """Every table of a report."""
    return [table for chapter in chapters for table in chapter.tables]
