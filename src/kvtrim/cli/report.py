"""`report`: result folders as tables, a Markdown page and one HTML page; checking documents."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtrim.cli import options, output
from kvtrim.errors import UsageError

if TYPE_CHECKING:
    from kvtrim.report.document import Chapter

BOARD = "leaderboard.html"
Results = Annotated[
    list[Path] | None,
    typer.Argument(
        help="Folders of eval, sweep or speed, joined into one report; with --check also "
        "documents (.md) whose marked tables are compared."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", help="Where report.md and report.html go. Default: the one folder given."
    ),
]
Check = Annotated[
    bool,
    typer.Option(
        "--check",
        help="Write nothing; fail if report.md, report.html or a document disagrees with "
        "the data.",
    ),
]
Fill = Annotated[
    list[Path] | None,
    typer.Option(help="Write the tables into a document's markers; repeat for several."),
]
Leaderboard = Annotated[
    bool,
    typer.Option(
        "--leaderboard",
        help="Also write leaderboard.html: score against the share held, each point with its "
        "samples.",
    ),
]


def report(
    results: Results = None,
    out: Out = None,
    check: Check = False,
    fill: Fill = None,
    leaderboard: Leaderboard = False,
    json: options.Json = False,
) -> None:
    """Tables and plots of result folders: report.md and report.html, one page without other files.

    Scores by method and budget in the papers' shapes, change against the full cache, loss and KL
    against measured bytes, heat maps of needles, speed; published figures beside ours where
    model, task, method and budget are the same. Everything is made of the lines of single samples.
    """
    from kvtrim.report import check as checking
    from kvtrim.report import gaps
    from kvtrim.report import results as folders
    from kvtrim.report.document import chapters, methods

    documents = [path for path in results or [] if path.suffix == ".md"]
    places = [path for path in results or [] if path not in documents]
    _require(places, documents, check, fill, leaderboard)
    target = _target(places, out)
    with output.busy("reading and averaging"):
        sections, speeds = folders.read_results(places)
        made = chapters(sections, speeds)
    for note in gaps.notes(folders.empty(places), sections):
        output.note(note)
    tables = checking.all_tables(made)
    if check:
        derived = [each for one in sections for run in one.runs for each in checking.averages(run)]
        _check(made, target, documents, [*derived, *_differences(target, sections, speeds)])
        return
    for path in fill or []:
        _write(path, checking.fill(path, tables).encode())
    _write_report(target, made, methods(sections, speeds))
    if leaderboard:
        from kvtrim.report import leaderboard as board

        _write(target / BOARD, board.page(sections, speeds).encode())
    if json:
        output.print_json(_json(target, made))
    else:
        for chapter in made:
            for table in chapter.tables[:1]:
                title = f"{chapter.title}: {table.title}"
                output.table(title, table.cells, wide=True)
        output.out.print(f"{target / 'report.md'} and {target / 'report.html'}", highlight=False)


def _differences(target: Path, sections: Sequence[Any], speeds: Sequence[Any]) -> list[str]:
    """What is wrong with a leaderboard that was written before."""
    from kvtrim.report import leaderboard as board

    path = target / BOARD
    if not path.exists() or path.read_text("utf-8") == board.page(sections, speeds):
        return []
    return [f"{path} is not what the data say; write it again with kvtrim report --leaderboard"]


def _require(
    places: list[Path],
    documents: list[Path],
    check: bool,
    fill: list[Path] | None,
    leaderboard: bool,
) -> None:
    if not places:
        raise UsageError("name a folder that kvtrim eval, sweep or speed wrote with --out")
    if documents and not check:
        raise UsageError(f"{documents[0]} is a document: add --check to compare it, or use --fill")
    if check and (fill or leaderboard):
        wrong = "--fill" if fill else "--leaderboard"
        raise UsageError(f"--check writes nothing; leave out {wrong}")


def _target(places: Sequence[Path], out: Path | None) -> Path:
    if out is not None:
        options.require_folder(out)
        return out
    if len(places) > 1:
        raise UsageError("several folders make one report: say with --out where it goes")
    return places[0]


def _check(
    chapters: "Sequence[Chapter]", target: Path, documents: Sequence[Path], derived: Sequence[Any]
) -> None:
    """Compare, say what differs, and leave with 1 if anything does."""
    from kvtrim.report import check as checking
    from kvtrim.report import markdown

    found = [*derived]
    if (target / "report.md").exists() or not documents:
        found += checking.pages(target, chapters, markdown.markdown(chapters, _links(chapters)))
    tables = checking.all_tables(chapters)
    for path in documents:
        found += checking.document(path, tables)
    for finding in found:
        output.err.print(str(finding), markup=False, highlight=False, soft_wrap=True)
    if found:
        raise typer.Exit(1)
    count = f"{len(tables)} tables, {len(documents)} document{'s' * (len(documents) != 1)}"
    output.out.print(f"as the data say: {count}", highlight=False)


def _links(chapters: "Sequence[Chapter]") -> dict[str, str]:
    """Where the file of each picture lies, as report.md links to it."""
    names = [picture["name"] for chapter in chapters for picture in chapter.pictures]
    return {name: f"plots/{name.replace('/', '-')}.png" for name in names}


def _write_report(target: Path, chapters: "Sequence[Chapter]", methods: Sequence[str]) -> None:
    """The pages and the pictures, as far as there is something to draw with."""
    from kvtrim.report import html, markdown

    links = _links(chapters)
    try:
        drawn = _draw(target, chapters, methods, links)
    except UsageError as error:
        drawn = {}
        output.err.print(f"kvtrim: {error}; the report has no plots", markup=False)
    _write(target / "report.md", markdown.markdown(chapters, links).encode())
    _write(target / "report.html", html.page(chapters, drawn).encode())


def _draw(
    target: Path,
    chapters: "Sequence[Chapter]",
    methods: Sequence[str],
    links: dict[str, str],
) -> dict[str, list[tuple[str, bytes]]]:
    """Every picture as PNG by the title of its chapter; those of an evaluation also as files."""
    from kvtrim.report.plots import evaluation, style
    from kvtrim.report.plots import speed as plots

    look, found = style.styles(methods), {}
    total, done = sum(len(chapter.pictures) + 3 * bool(chapter.speed) for chapter in chapters), 0
    with output.progress() as tell:
        for chapter in chapters:
            own = found.setdefault(chapter.title, [])
            for picture in chapter.pictures:
                tell(f"drawing {picture['name']}", done, total)
                data, done = evaluation.draw(picture, look), done + 1
                _write(target / links[picture["name"]], data)
                own.append((picture["title"], data))
            if chapter.speed:
                tell(f"drawing {chapter.title}", done, total)
                own += _speed(plots, chapter, look)
                done += 3
    return found


def _speed(plots: Any, chapter: "Chapter", look: dict[str, Any]) -> list[tuple[str, bytes]]:
    with TemporaryDirectory() as folder:
        made = plots.speed(chapter.speed, Path(folder), chapter.title, look)
        return [(f"{chapter.title}: {path.stem}", path.read_bytes()) for path in made]


def _write(path: Path, content: bytes) -> None:
    from kvtrim import files

    files.make_folder(path.parent, parents=True)
    files.replace(path, content)


def _json(target: Path, chapters: "Sequence[Chapter]") -> dict[str, Any]:
    """Every table for machines."""
    return {
        "report": str(target / "report.md"),
        "html": str(target / "report.html"),
        "tables": [
            {
                "name": table.name,
                "title": table.title,
                "columns": table.cells.headings,
                "rows": list(table.cells.rows),
            }
            for chapter in chapters
            for table in chapter.tables
        ],
    }
