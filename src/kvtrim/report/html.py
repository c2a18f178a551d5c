"""A report as one HTML page that needs no other file: tables, pictures within, light and dark."""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from html import escape as html_escape

from kvtrim.report.document import Chapter
from kvtrim.report.format import visible
from kvtrim.report.markdown import ABOUT, TITLE
from kvtrim.report.names import plain
from kvtrim.report.tables import Table

DIGEST = "kvtrim-tables"
_INTERVAL = re.compile(r"(?P<mean>\S+) (?P<spread>\(\S+ to \S+\))(?P<rest>.*)")
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1f23; --soft: #5b6470; --paper: #ffffff;
  --line: #d8dde3; --band: #f5f7f9; --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a2abb5; --paper: #16191d;
  --line: #363c44; --band: #1e2329; --link: #7db7f0; } }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: .2em 0; }
h2 { font-size: 1.3rem; margin: 2.4em 0 .4em; padding-top: .5em;
  border-top: 2px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.8em 0 .3em; }
p { margin: .4em 0 .8em; max-width: 85ch; }
.about { color: var(--soft); }
a { color: var(--link); }
nav { border: 1px solid var(--line); border-radius: 6px; padding: .6em 1em; margin: 1em 0; }
nav ul { margin: .2em 0; padding-left: 1.2em; }
nav ul ul { columns: 3 15em; }
nav li { break-inside: avoid; }
.wide { overflow: auto; max-height: 85vh; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px;
  width: 100%; }
th, td { padding: .28em .6em; text-align: right; white-space: nowrap; vertical-align: baseline; }
th { border-bottom: 1px solid var(--line); background: var(--band); font-weight: 600;
  position: sticky; top: 0; }
@media print { .wide { max-height: none; } }
tbody tr:nth-child(even) td { background: var(--band); }
.left { text-align: left; }
.long { white-space: normal; min-width: 16em; }
.spread { display: block; color: var(--soft); font-size: 11px; }
figure { margin: 1.2em 0; }
figure img { display: block; max-width: 100%; height: auto; background: #ffffff; padding: 6px;
  border: 1px solid var(--line); border-radius: 6px; }
code { font-size: 12px; color: var(--soft); }
"""
_LONG = 40  # characters of a cell that may be broken


def escape(text: str) -> str:
    """Foreign text, shown as it stands."""
    return html_escape(visible(text))


def page(chapters: Sequence[Chapter], drawn: Mapping[str, Sequence[tuple[str, bytes]]]) -> str:
    """The page.

    Args:
        drawn: PNG pictures of a chapter by its title, each with what it shows.
    """
    body = [f"<h1>{TITLE}</h1>\n<p>{_prose(ABOUT)}</p>\n{_contents(chapters)}"]
    for chapter in chapters:
        body.append(f'<h2 id="{plain(chapter.title)}">{escape(chapter.title)}</h2>')
        body += [f"<p>{_prose(chapter.about)}</p>"] if chapter.about else []
        pictures = [_picture(about, data) for about, data in drawn.get(chapter.title, ())]
        tables = [_table(table) for table in chapter.tables]
        body += [*tables[:1], *pictures, *tables[1:]]
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="{DIGEST}" content="{digest(chapters)}">\n'
        f"<title>{TITLE}</title>\n<style>{_STYLE}</style>\n</head>\n"
    )
    return head + "<body>\n<main>\n" + "\n".join(body) + "\n</main>\n</body>\n</html>\n"


def digest(chapters: Sequence[Chapter]) -> str:
    """What tells whether a page was made of the same tables."""
    tables = [table for chapter in chapters for table in chapter.tables]
    text = "\n".join(f"{table.name}\n{table.about}\n{table.markdown()}" for table in tables)
    return hashlib.sha256(text.encode()).hexdigest()


def _contents(chapters: Sequence[Chapter]) -> str:
    parts = []
    for chapter in chapters:
        inner = "".join(f"<li>{_link(table.name, table.title)}</li>" for table in chapter.tables)
        parts.append(f"<li>{_link(chapter.title, chapter.title)}<ul>{inner}</ul></li>")
    return f"<nav><strong>Contents</strong><ul>{''.join(parts)}</ul></nav>"


def _link(name: str, text: str) -> str:
    return f'<a href="#{plain(name)}">{escape(text)}</a>'


def _prose(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _table(table: Table) -> str:
    sides = [side for _, side in table.columns]
    head = "".join(f"<th{_class(side)}>{escape(name)}</th>" for name, side in table.columns)
    cells = [
        [_cell(text, side) for text, side in zip(row, sides, strict=True)] for row in table.rows
    ]
    lines = [f"<tr>{''.join(row)}</tr>" for row in cells]
    return (
        f'<h3 id="{plain(table.name)}">{escape(table.title)}</h3>\n'
        f'<p class="about">{_prose(table.about)} <code>{escape(table.name)}</code></p>\n'
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def _cell(text: str, side: str) -> str:
    found = _INTERVAL.fullmatch(text)
    if found is None:
        long = " long" if len(text) > _LONG else ""
        return f"<td{_class(side, long)}>{escape(text)}</td>"
    mean, spread = escape(found["mean"] + found["rest"]), escape(found["spread"])
    return f'<td{_class(side)}>{mean} <span class="spread">{spread}</span></td>'


def _class(side: str, more: str = "") -> str:
    names = (["left"] if side == "left" else []) + more.split()
    return f' class="{" ".join(names)}"' if names else ""


def _picture(about: str, data: bytes) -> str:
    text = base64.b64encode(data).decode()
    label = escape(" ".join(about.split()))
    return f'<figure><img alt="{label}" src="data:image/png;base64,{text}"></figure>'
