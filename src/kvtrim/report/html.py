"""A report as one HTML page that needs no other file: tables, pictures within, light and dark.

Rows can be sorted and filtered where scripts run; without them the page shows everything.
"""

import base64
import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from html import escape as html_escape

from kvtrim.report import best
from kvtrim.report.document import Chapter
from kvtrim.report.format import visible
from kvtrim.report.markdown import ABOUT, TITLE
from kvtrim.report.names import plain
from kvtrim.report.tables import Table

DIGEST = "kvtrim-tables"
_INTERVAL = re.compile(r"(?P<mean>\S+) (?P<spread>\(\S+ to \S+\))(?P<rest>.*)")
STYLE = """
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
.best { font-weight: 700; }
.filter { display: none; position: sticky; top: 0; z-index: 1; padding: .4em 0;
  background: var(--paper); }
.filter input { font: inherit; width: min(100%, 32em); padding: .3em .6em; }
.script .filter { display: block; }
.script th { cursor: pointer; }
th[aria-sort=ascending]::after { content: " \\25b2"; }
th[aria-sort=descending]::after { content: " \\25bc"; }
"""
SCRIPT = """
"use strict";
const UNITS = { KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30, ms: 1e-3 };
function valueOf(text) {
  const found = /^[x]?([+-]?[0-9][0-9.]*)\\s?([A-Za-z]*)/.exec(text.trim());
  return found ? parseFloat(found[1]) * (UNITS[found[2]] || 1) : null;
}
function compare(one, other) {
  const [a, b] = [valueOf(one), valueOf(other)];
  if (a !== null && b !== null) return a - b;
  return (a === null) - (b === null) || one.localeCompare(other);
}
function isShown(method, keep, wanted) {
  const words = wanted.toLowerCase().split(/[\\s,]+/).filter(Boolean);
  const budgets = words.filter((word) => /^[0-9]/.test(word));
  const names = words.filter((word) => !/^[0-9]/.test(word));
  if (method === "full" || method === "transformers") return true;
  return (!names.length || names.some((name) => method.toLowerCase().includes(name)))
    && (!budgets.length || budgets.includes(keep));
}
function begin(page) {
  page.documentElement.classList.add("script");
  const tables = [...page.querySelectorAll("main table")];
  for (const table of tables) {
    const heads = [...table.querySelectorAll("th")];
    heads.forEach((head, at) => head.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => (down ? -1 : 1) * compare(a.cells[at].textContent,
        b.cells[at].textContent));
      table.tBodies[0].append(...rows);
    }));
  }
  page.querySelector(".filter input").addEventListener("input", (event) => {
    for (const table of tables) {
      const heads = [...table.querySelectorAll("th")].map((head) => head.textContent);
      const [method, keep] = [heads.indexOf("method"), heads.indexOf("keep")];
      if (method < 0) continue;
      for (const row of table.tBodies[0].rows) {
        const budget = keep < 0 ? "" : row.cells[keep].textContent;
        row.hidden = !isShown(row.cells[method].textContent, budget, event.target.value);
      }
    }
  });
}
if (typeof document !== "undefined") begin(document);
"""
FILTER = (
    '<p class="filter"><label>Rows: <input type="search" placeholder="snapkv kvzip 256">'
    "</label></p>"
)
BEST = (
    "Bold is the best of its budget; intervals tell whether the others are worse. "
    "A click on a heading sorts, and the field above shows some methods and budgets alone."
)
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
    body += [FILTER, f'<p class="about">{BEST}</p>']
    if short := best.summary(chapters):
        body += ['<h2 id="summary">Summary</h2>', *map(_table, short)]
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
        f"<title>{TITLE}</title>\n<style>{STYLE}</style>\n</head>\n"
    )
    foot = f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    return head + "<body>\n<main>\n" + "\n".join(body) + foot


def digest(chapters: Sequence[Chapter]) -> str:
    """What tells whether a page was made of the same tables."""
    tables = [table for chapter in chapters for table in chapter.tables]
    text = "\n".join(f"{table.name}\n{table.about}\n{table.cells.markdown()}" for table in tables)
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
    sides = [side for _, side in table.cells.columns]
    head = "".join(f"<th{_class(side)}>{escape(name)}</th>" for name, side in table.cells.columns)
    won = best.best_cells(table)
    lines = []
    for number, row in enumerate(table.cells.rows):
        bold = {at for at in range(len(row)) if (number, at) in won}
        lines.append(f"<tr>{''.join(_cells(row, sides, bold))}</tr>")
    return (
        f'<h3 id="{plain(table.name)}">{escape(table.title)}</h3>\n'
        f'<p class="about">{_prose(table.about)} <code>{escape(table.name)}</code></p>\n'
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def _cells(row: Sequence[str], sides: Sequence[str], bold: Collection[int]) -> list[str]:
    pairs = enumerate(zip(row, sides, strict=True))
    return [_cell(text, side, "best" * (at in bold)) for at, (text, side) in pairs]


def _cell(text: str, side: str, kind: str) -> str:
    found = _INTERVAL.fullmatch(text)
    if found is None:
        long = " long" if len(text) > _LONG else ""
        return f"<td{_class(side, kind + long)}>{escape(text)}</td>"
    mean, spread = escape(found["mean"] + found["rest"]), escape(found["spread"])
    return f'<td{_class(side, kind)}>{mean} <span class="spread">{spread}</span></td>'


def _class(side: str, more: str = "") -> str:
    names = (["left"] if side == "left" else []) + more.split()
    return f' class="{" ".join(names)}"' if names else ""


def _picture(about: str, data: bytes) -> str:
    text = base64.b64encode(data).decode()
    label = escape(" ".join(about.split()))
    return f'<figure><img alt="{label}" src="data:image/png;base64,{text}"></figure>'
