"""A report as Markdown: `report.md`, whose tables stand between markers that `--check` reads."""

from collections.abc import Mapping, Sequence

from kvtrim.report.document import Chapter, anchor
from kvtrim.report.format import escape, prose
from kvtrim.report.tables import Table

TITLE = "kvtrim report"
ABOUT = (
    "Made by `kvtrim report` from the lines of single samples; `kvtrim report --check` makes it "
    "again and compares. Every score says under which protocol it was measured and carries a 95 % "
    "bootstrap interval; held bytes are measured, not nominal."
)


def markdown(chapters: Sequence[Chapter], plots: Mapping[str, str]) -> str:
    """The page.

    Args:
        plots: the files that were drawn, by chapter and picture: (title, path) as a link needs it.
    """
    parts = [f"# {TITLE}\n\n{ABOUT}\n", _contents(chapters)]
    for chapter in chapters:
        parts.append(f"## {escape(chapter.title)}\n")
        parts += [f"{prose(chapter.about)}\n"] if chapter.about else []
        parts += [table_section(table) for table in chapter.tables]
        names = [picture["name"] for picture in chapter.pictures]
        parts += [_link(name, plots[name]) for name in names if name in plots]
    return "\n".join(parts)


def _contents(chapters: Sequence[Chapter]) -> str:
    return "".join(
        f"- [{escape(chapter.title)}](#{anchor(chapter.title)})\n" for chapter in chapters
    )


def table_section(table: Table) -> str:
    """A table under its heading, between its markers."""
    title, about = escape(table.title), prose(table.about)
    return f"### {title}\n\n{about}\n\n{between(table.name, '', table)}"


def between(name: str, wanted: str, table: Table) -> str:
    """A table between its markers."""
    start = f"<!-- kvtrim:table {name}{wanted} -->"
    return f"{start}\n\n{table.cells.markdown()}\n<!-- /kvtrim:table -->\n"


def _link(name: str, path: str) -> str:
    return f"![{escape(name)}](<{path}>)\n" if " " in path else f"![{escape(name)}]({path})\n"
