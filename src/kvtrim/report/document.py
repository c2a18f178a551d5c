"""A report as chapters: one per model, protocol and length of an evaluation, one per speed run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvtrim.report import evaluation, max_batch, names, published, speed
from kvtrim.report import figures_data as pictures
from kvtrim.report.figures_data import Picture
from kvtrim.report.format import Cells
from kvtrim.report.lookup import View
from kvtrim.report.results import Section, SpeedRun, across_lengths
from kvtrim.report.tables import Table

_ENDS = ("spread", "published", "failed")  # of the names of a speed run's further tables
PROTOCOLS = {
    "question-agnostic": "The context was compressed before the question was known; the question "
    "then ran against the compressed cache.",
    "question-aware": "Context and question were read together and then compressed. The first "
    "token of an answer still saw everything, so short answers flatter every method.",
}


@dataclass(frozen=True)
class Chapter:
    """Tables and what is to be drawn."""

    title: str
    about: str
    tables: Sequence[Table]
    pictures: Sequence[Picture] = ()
    speed: Sequence[Mapping[str, Any]] = field(
        default=(), repr=False
    )  # rows, drawn by plots.speed
    folder: str = ""  # of a speed run or a search

    @property
    def anchor(self) -> str:
        """What links to it are called."""
        return anchor(self.title)


def chapters(sections: Sequence[Section], speeds: Sequence[SpeedRun]) -> list[Chapter]:
    """The whole report, without its drawings. No two chapters, tables or pictures share a name."""
    models = [section.model for section in sections]
    short = names.short([*models, *(str(run.record["model"]["name"]) for run in speeds)])
    sections = [replace(section, short=short[section.model]) for section in sections]
    needles = {task for section in sections for task in View(section).grids}
    made = [
        _evaluation_chapter(View(each)) for each in across_lengths(sections, needles.__contains__)
    ]
    tables, titles = names.Names(), names.Names()
    for kind, search in (("speed", False), ("largest-batch", True)):
        for number, run in enumerate(run for run in speeds if run.is_search == search):
            slug, folder = short[str(run.record["model"]["name"])], Path(run.folder).name
            choices = [f"{slug}/{kind}"] * (number == 0) + [f"{slug}/{kind}-{folder}"]
            start = "-".join(tables.new(*choices).split())
            for end in _ENDS:
                tables.new(f"{start}-{end}")
            made.append((_search_chapter if search else _speed_chapter)(run, start))
    distinct = []
    for chapter in made:
        choices = [chapter.title, *[f"{chapter.title} ({chapter.folder})"] * bool(chapter.folder)]
        distinct.append(replace(chapter, title=titles.new(*choices)))
    return distinct


def methods(sections: Sequence[Section], speeds: Sequence[SpeedRun]) -> list[str]:
    """Every method of the report, in an order that gives each its colour."""
    met = [line.method for section in sections for line in section.lines]
    return list(dict.fromkeys(met + [line["method"] for run in speeds for line in run.lines]))


def _evaluation_chapter(view: View) -> Chapter:
    section = view.section
    about = f"{PROTOCOLS.get(section.protocol, '')} Scores are means over the samples of a task."
    about = " ".join([about, *(f"{remark}." for remark in section.remarks)])
    made = evaluation.all_tables(view), pictures.all_pictures(view)
    return Chapter(section.title, about.strip(), *made)


def _speed_chapter(run: SpeedRun, start: str) -> Chapter:
    """Seconds and bytes of one speed run."""
    record = run.record
    rows = speed.rows(run.lines, record["limits"])
    about = f"{speed.title(record)}. To plain: ratio to plain transformers in the same round."
    made = [Table(start, "Speed and memory", about, speed.table(rows))]
    spread = speed.spread_table(rows)
    made += [Table(f"{start}-spread", "Spread and floors", speed.FLOORS, spread)]
    beside = published.cells(record["model"], rows, only_measured=True)
    title = "Published beside ours, as ratios to the full cache"
    made += [Table(f"{start}-published", title, published.ABOUT, beside)]
    missing = Cells.texts(["what and why"], [[line] for line in speed.reasons(rows)])
    made += [Table(f"{start}-failed", "Not measured", "", missing)]
    title = f"Speed: {record['model']['name']}, {record['machine']['device']}"
    shown = [table for table in made if table.cells.rows]
    return Chapter(title, "", shown, speed=rows, folder=Path(run.folder).name)


def _search_chapter(run: SpeedRun, start: str) -> Chapter:
    """The largest batches of one search."""
    record = run.record
    about = f"{max_batch.title(record)}. {max_batch.ABOUT}"
    cells = max_batch.table(max_batch.rows([dict(line) for line in run.batches]))
    title = f"Largest batches: {record['model']['name']}, {record['machine']['device']}"
    tables = [Table(start, "Largest batches", about, cells)]
    return Chapter(title, "", tables if cells.rows else [], folder=Path(run.folder).name)


def anchor(text: str) -> str:
    """A title as the end of a link, as GitHub makes it."""
    kept = "".join(c for c in text.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")
