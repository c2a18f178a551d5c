"""What an analysis found: a table for people and machines, and the panels of its figure as data.

`kvtrim.report.plots.panels` draws the panels. A panel is one of

    lines    title, x, y, series: [{label, x, y, low?, high?}]; log_x, log_y, level, ordered,
             ticks, limits (of y), front: [x, y]
    points   title, x, y, series: [{label, x, y, colour?}]; log_x, log_y, bar (what colours mean)
    map      title, x, y, z, cells: rows of numbers or None; xs, ys (labels), log, low, high
    ranks    title, methods: [(name, mean rank)], distance (the critical one), cliques
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvtrim.report.format import Cells, Column

Cell = str | int | float | None
Panel = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """The table and the figure of one analysis."""

    title: str
    about: str  # what was measured, on what, under which protocol
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    panels: Sequence[Panel]
    across: int = 2  # panels beside each other
    more: Mapping[str, Any] = field(default_factory=dict)  # what only the JSON holds
    subject: str = ""  # what was measured, for below the title of the picture

    @property
    def heading(self) -> str:
        """What stands over the picture."""
        return f"{self.title}\n{self.subject}" if self.subject else self.title

    @property
    def cells(self) -> Cells:
        """The table as people read it."""
        return Cells(self.columns, [[show(cell) for cell in row] for row in self.rows])

    def markdown(self) -> str:
        """A page: title, what it is, the table."""
        return f"# {self.title}\n\n{self.about}\n\n{self.cells.markdown()}"

    def json(self) -> dict[str, Any]:
        """Everything, for machines."""
        names = self.cells.headings
        return {
            "title": self.title,
            "about": self.about,
            "columns": names,
            "rows": [dict(zip(names, row, strict=True)) for row in self.rows],
            "panels": [dict(panel) for panel in self.panels],
            **self.more,
        }


def show(cell: Cell) -> str:
    """A figure with four digits, a dash for none."""
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.4g}" if abs(cell) < 10000 else f"{cell:,.0f}"
    return str(cell)
