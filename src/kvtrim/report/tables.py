"""A table of a report, and how figures look in its cells."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from kvtrim.report.format import Cells, Column, size
from kvtrim.report.lookup import FULL, Row, View
from kvtrim.report.statistics import Figure

HEAD: list[Column] = [("method", "left"), ("keep", "right")]
MISSING = "-"


@dataclass(frozen=True)
class Table:
    """Cells with a name by which documents refer to them, and a sentence that says what they are.

    The name begins with the section's: smollm2/question-agnostic/2048/ruler.
    """

    name: str
    title: str
    about: str
    cells: Cells

    def only(self, wanted: Mapping[str, Sequence[str]]) -> "Table":
        """The rows whose cells under these headings are among the wanted ones."""
        names, all_rows = self.cells.headings, self.cells.rows
        at = {names.index(name): values for name, values in wanted.items() if name in names}
        rows = [row for row in all_rows if all(row[i] in values for i, values in at.items())]
        return replace(self, cells=Cells(self.cells.columns, rows))


def score(figure: Figure | None) -> str:
    """A score of 0 to 1 as points of 100, with its interval: 41.2 (35.0 to 47.1)."""
    return _spread(figure, lambda value: f"{100 * value:.1f}")


def percent(figure: Figure | None) -> str:
    """A relative change: -12.3% (-20.1% to -5.0%)."""
    return _spread(figure, lambda value: f"{100 * value + 0.0:+.1f}%")


def nats(figure: Figure | None) -> str:
    """Nats per token, three digits behind the point."""
    return _spread(figure, lambda value: f"{value:.3f}")


def share(value: float | None) -> str:
    """A share in percent: 12.5%."""
    return MISSING if value is None else f"{100 * value:.1f}%"


def mebibytes(value: float | None) -> str:
    """Bytes that people can read."""
    return size(value if value is None else round(value))


def keep(row: Row) -> str:
    """The budget of a row; "all" for the full cache."""
    return row[1] or "all"


def _spread(figure: Figure | None, shown: Callable[[float], str]) -> str:
    if figure is None:
        return MISSING
    text = _plain(shown(figure.value))
    if figure.low is None or figure.high is None:
        return f"{text} (one sample)" if figure.samples == 1 else text
    return f"{text} ({_plain(shown(figure.low))} to {_plain(shown(figure.high))})"


def _plain(text: str) -> str:
    """No minus before a zero."""
    return text.replace("-", "+" if text.endswith("%") else "") if _is_zero(text) else text


def _is_zero(text: str) -> bool:
    return not text.strip("+-0.%")


def scores(
    view: View,
    name: str,
    title: str,
    about: str,
    columns: Mapping[str, str],
    known: Iterable[str] = (),
    average: bool = True,
) -> Table:
    """A row per method and budget, a column per task, and the average of those that are there.

    Args:
        columns: the tasks measured, by heading.
        known: every heading the papers have; those without a task stay empty.
    """
    headings = [*(known or columns)]
    shown: list[Column] = [*HEAD, ("held", "right")]
    shown += [(heading, "right") for heading in headings]
    shown += [("average", "right"), ("over", "right")] if average else []
    rows = []
    for row in view.rows:
        tasks = [columns.get(heading) for heading in headings]
        own = view.tasks_with_score([task for task in tasks if task], row)
        held = view.memory(columns.values(), row)
        line = [row[0], keep(row), share(held and held[1])]
        line += [_cell(view, task, row) for task in tasks]
        if average:
            line += [score(view.mean(own, row)), f"{len(own)} of {len(headings)}"]
        if held is not None:
            rows.append(line)
    return section_table(view, name, title, about, Cells(shown, rows))


def section_table(view: View, name: str, title: str, about: str, cells: Cells) -> Table:
    """A table of this view's section, which says under which protocol it was measured."""
    section = view.section
    told = f"{section.protocol.capitalize()}. {about}"
    return Table(f"{section.slug}/{name}", title, told, cells)


def _cell(view: View, task: str | None, row: Row) -> str:
    """A task's score; how many samples of how many, where some are missing."""
    if task is None:
        return MISSING
    own, base = view.values(task, row), view.values(task, FULL)
    text = score(view.mean([task], row))
    return f"{text} n={len(own)}/{len(base)}" if 0 < len(own) < len(base) else text
