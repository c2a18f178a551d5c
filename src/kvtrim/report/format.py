"""Figures and foreign text as people read them."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


def size(count: int | float | None) -> str:
    """Bytes: 22.7 MiB."""
    if count is None:
        return "-"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def seconds(value: float | None) -> str:
    """A duration: 8.31 s or 45.2 ms."""
    if value is None:
        return "-"
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"


def ratio(value: float | None) -> str:
    """Relative to a reference: x0.51."""
    return "-" if value is None else f"x{value:.2f}"


def spread(value: float | None, limits: list[float] | None, scale: float = 1.0) -> str:
    """A median and, behind it, the least and the most: 45.2 (44.9 to 47.0)."""
    if value is None or limits is None:
        return "-"
    low, high = (scale * limit for limit in limits)
    return f"{_three(scale * value)} ({_three(low)} to {_three(high)})"


def _three(value: float) -> str:
    """Three digits, more before the point."""
    places = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:,.{places + (abs(value) < 1)}f}"


def visible(text: str) -> str:
    r"""Text of anybody's, with what would act on a terminal or a page shown instead of obeyed.

    Control characters but line breaks and tabs, marks that turn the direction of writing, other
    separators of lines, and halves of characters become escapes such as \x1b and \u202e.
    """
    return "".join(map(_show, text)) if not text.isascii() or _CONTROL.search(text) else text


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_JOINERS = "\u200c\u200d"  # which letters and emoji need


def _show(letter: str) -> str:
    kind = unicodedata.category(letter)
    if letter in "\n\t" or letter in _JOINERS or kind not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return letter
    code = ord(letter)
    return (
        f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    )


def escape(text: str) -> str:
    """Foreign text for Markdown, in which it then is text: no tags, comments, links or breaks."""
    line = " ".join(visible(text).split("\n"))
    html = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKS.sub(r"\\\g<0>", html)


_MARKS = re.compile(r"[\\`*\[\]|]|(?<!\w)_|_(?!\w)|^[#+-](?=\s)|~(?=~)")


def prose(text: str) -> str:
    """A sentence of ours with foreign names in it, for Markdown: its code marks stay, tags go."""
    return visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


Column = tuple[str, str]
"""(heading, "left" or "right")."""


@dataclass(frozen=True)
class Cells:
    """A table: its columns, and rows of as many texts."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]

    @classmethod
    def texts(cls, headings: Iterable[str], rows: Iterable[Sequence[str]]) -> "Cells":
        """One of words alone."""
        return cls([(heading, "left") for heading in headings], list(rows))

    @property
    def headings(self) -> list[str]:
        """The columns' names."""
        return [heading for heading, _ in self.columns]

    def markdown(self) -> str:
        """A Markdown table of anybody's text."""
        return self._lines(escape)

    def markup(self) -> str:
        """A Markdown table whose cells are Markdown of ours."""
        return self._lines(lambda text: text.replace("|", "\\|"))

    def _lines(self, cell: Callable[[str], str]) -> str:
        rule = ["---:" if side == "right" else "---" for _, side in self.columns]
        head, *lines = [[cell(text) for text in line] for line in (self.headings, *self.rows)]
        return "".join("| " + " | ".join(line) + " |\n" for line in (head, rule, *lines))
