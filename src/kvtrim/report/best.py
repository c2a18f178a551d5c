"""Which cells of a table are the best of their budget, and what a report says first of all.

Bytes are no merit of their own, since rows of one budget were asked for the same: what is held is
never marked. The full cache and plain transformers are references, and win nothing.
"""

import re
from collections import defaultdict
from collections.abc import Sequence

from kvtrim.report.document import Chapter
from kvtrim.report.format import Cells, Column
from kvtrim.report.tables import MISSING, Table

FULL = "full"
REFERENCES = {FULL, "transformers"}
_APART = ("tokens", "batch", "keep")  # rows that differ in these are not compared
_UNJUDGED = {
    "method",
    *_APART,
    "held",
    "of full",
    "entries",
    "tasks",
    "over",
    "to plain",
    "samples",
    "floor",
    "per step",
    "in use",
}
_LOWER = ("loss", "KL", "first token", "per token", "end to end", "peak", "decode peak")
_NUMBER = re.compile(r"([+-]?\d[\d.]*)\s?([A-Za-z%]*)")
_SUMMARY = ("score", "loss above full")
_COLUMNS: list[Column] = [
    ("keep", "right"),
    ("best score", "left"),
    ("score", "right"),
    ("full cache", "right"),
]
_COLUMNS += [("least loss", "left"), ("loss above full", "right")]


def best_cells(table: Table) -> set[tuple[int, int]]:
    """(row, column) of the best cells of each budget; all of them where several are equal."""
    headings, all_rows = table.cells.headings, table.cells.rows
    if "method" not in headings or "keep" not in headings:
        return set()
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    apart = [at for at, heading in enumerate(headings) if heading in _APART]
    for number, row in enumerate(all_rows):
        if row[headings.index("method")] not in REFERENCES:
            groups[tuple(row[at] for at in apart)].append(number)
    judged = [at for at, heading in enumerate(headings) if heading not in _UNJUDGED]
    return {
        (number, at)
        for rows in groups.values()
        for at in judged
        for number in _winners(rows, [all_rows[n][at] for n in rows], headings[at])
    }


def summary(chapters: Sequence[Chapter]) -> list[Table]:
    """For each chapter with an overview: the best method of every budget, by score and by loss."""
    made = []
    for chapter in chapters:
        for table in chapter.tables:
            headings = table.cells.headings
            if table.name.endswith("/overview") and set(_SUMMARY) <= set(headings):
                rows = _best_rows(table)
                name = table.name.removesuffix("/overview") + "/summary"
                made += [Table(name, chapter.title, "", Cells(_COLUMNS, rows))] if rows else []
    return made


def _winners(rows: Sequence[int], cells: Sequence[str], heading: str) -> list[int]:
    """The rows of the best cell; none where they cannot be compared, or nothing is to be won."""
    found = [(number, _NUMBER.match(cell)) for number, cell in zip(rows, cells, strict=True)]
    read = [(number, float(match[1]), match[2]) for number, match in found if match]
    if len(read) < 2 or len({unit for *_, unit in read}) > 1:
        return []
    lower = heading.startswith(_LOWER)
    best = (min if lower else max)(value for _, value, _ in read)
    return [number for number, value, _ in read if value == best]


def _best_rows(table: Table) -> list[list[str]]:
    headings, all_rows = table.cells.headings, table.cells.rows
    method, keep = headings.index("method"), headings.index("keep")
    full = [row for row in all_rows if row[method] == FULL]
    best = best_cells(table)
    rows = []
    for budget in dict.fromkeys(row[keep] for row in all_rows if row[method] not in REFERENCES):
        cells = [budget]
        for heading in _SUMMARY:
            at = headings.index(heading)
            won = [n for n, row in enumerate(all_rows) if row[keep] == budget and (n, at) in best]
            names = ", ".join(all_rows[n][method] for n in won) or MISSING
            cells += [names, all_rows[won[0]][at] if won else MISSING]
            if heading == "score":
                cells.append(full[0][at] if full else MISSING)
        rows.append(cells)
    return rows
