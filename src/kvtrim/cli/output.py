"""How results look: tables, bytes, sparklines, progress on standard error."""

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from kvtrim.report.format import Cells, seconds, size, visible

__all__ = ["Cells", "seconds", "size"]  # a name for them here too, beside `entries`

_WIDEST = 10_000  # columns of a line in a file: nothing is cut
_SHORT = 16  # a cell up to this width is never broken
_BARS = "▁▂▃▄▅▆▇█"

_ACTING = re.compile(r"[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class Terminal(Console):
    """A console on which text is text.

    Questions, answers, names of files and models may hold anything: what looks like markup is
    shown as it stands, and what would act on the terminal is shown instead of obeyed.
    """

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def print(self, *objects: Any, **how: Any) -> None:
        """As rich does, with text made visible."""
        super().print(*(visible(x) if isinstance(x, str) else x for x in objects), **how)


out = Terminal(width=None if sys.stdout.isatty() else 110)
err = Terminal(stderr=True)


def print_json(value: Any) -> None:
    """One JSON object on one line, for machines; what would act on a terminal is spelled out."""
    text = json.dumps(value, ensure_ascii=False)
    sys.stdout.write(_ACTING.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")


def note(text: str) -> None:
    """A remark beside the results, on the error stream."""
    err.print(f"kvtrim: {text}", soft_wrap=True)


def lines(texts: Sequence[str]) -> None:
    """Sentences as they are, one a line."""
    for text in texts:
        out.print(text)


def table(title: str, cells: Cells, wide: bool = False) -> None:
    """A table.

    A wide one breaks its headings and, in a file, is as wide as it needs to be.
    """
    rows = [[visible(cell) for cell in row] for row in cells.rows]
    drawn = Table(
        title=visible(title), title_justify="left", header_style="bold", box=box.SIMPLE_HEAD
    )
    named = all(" " not in row[0] for row in rows)
    for number, (heading, side) in enumerate(cells.columns):
        name = number == 0 and named
        short = name or side == "right" or all(len(row[number]) <= _SHORT for row in rows)
        drawn.add_column(
            heading.replace(" ", "\n", 1) if wide else heading,
            justify="right" if side == "right" else "left",
            no_wrap=short,
            # what a row is about stays whole, whatever else has to be cut to fit
            min_width=max((len(row[0]) for row in rows), default=None) if name else None,
        )
    for row in rows:
        drawn.add_row(*row)
    if wide and not out.is_terminal:
        needed = out.measure(drawn, options=out.options.update(width=_WIDEST)).maximum
        out.width = max(out.width, needed)
    out.print(drawn)


def facts(rows: Sequence[tuple[str, str]]) -> None:
    """Labelled sentences below each other; rows without a sentence are left out."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for label, said in rows:
        if said:
            grid.add_row(label, Text(visible(said)))
    out.print(grid, highlight=False)


def entries(kept: Sequence[Sequence[int]]) -> str:
    """Entries per layer and head, in short: "512", or "61-991" with bars over the layers."""
    counts = [count for layer in kept for count in layer]
    if not counts:
        return "-"
    low, high = min(counts), max(counts)
    if low == high:
        return str(low)
    means = [sum(layer) / len(layer) for layer in kept]
    if max(means) <= 1.05 * min(means):  # heads differ, layers do not
        return f"{low} to {high}"
    shown = means[:: max(1, len(means) // 10)]
    bars = "".join(_BARS[round(mean / max(means) * (len(_BARS) - 1))] for mean in shown)
    return f"{low} to {high} {bars}"


class Stream:
    """An answer on standard output as it comes; foreign text acts on no terminal."""

    def __init__(self) -> None:
        self._begun = False

    def __call__(self, piece: str) -> None:
        """Show a piece of it; blanks before the first word are left out."""
        piece = piece if self._begun else piece.lstrip()
        if piece:
            self._begun = True
            sys.stdout.write(visible(piece))
            sys.stdout.flush()

    def end(self, empty: str) -> None:
        """Close the line; say so where there was no answer."""
        sys.stdout.write("\n" if self._begun else f"{empty}\n")
        sys.stdout.flush()


@contextmanager
def busy(what: str) -> Iterator[Callable[[str], None]]:
    """A spinner on standard error where there is no measure; yields `say(what)`."""
    if not err.is_terminal:
        yield lambda what: None
        return
    with err.status(Text(visible(what))) as status:
        yield lambda what: status.update(Text(visible(what)))


@contextmanager
def progress(left: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error, shown in a terminal; yields `report(what, done, out_of)`.

    With `left` it says how much time is left, of parts that take about as long as each other.
    """
    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    ]
    if left:
        columns += [TextColumn("left:"), TimeRemainingColumn(elapsed_when_finished=False)]
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        task = bars.add_task("starting", total=1)

        def report(what: str, done: int, out_of: int) -> None:
            bars.update(task, description=visible(what), completed=done, total=max(1, out_of))

        yield report
