"""A leaderboard as one HTML page: quality against the share held, down to 1/32 of the full cache.

Every point and every cell opens the samples that it was made of. The page needs no other file.
"""

from collections.abc import Mapping, Sequence
from math import ceil, log2
from statistics import fmean, median

from kvtrim.report.format import seconds
from kvtrim.report.frontiers import COSTS, Point, front, points
from kvtrim.report.html import STYLE, escape
from kvtrim.report.lookup import FULL, View, size_of
from kvtrim.report.results import Line, Section, SpeedRun

LEAST = 5  # the axis reaches 2 ** -5 of the full cache at least
TITLE = "Leaderboard"
ABOUT = (
    "Mean score over the tasks that the full cache has scores on, 0 to 100, with 95 % bootstrap "
    "intervals. Shares are measured bytes after the prompt over those of the full cache. The "
    "black line is the front: nothing on it is beaten in both. A point or cell opens its samples."
)
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5C00")
_SHAPES = ("circle", "square", "diamond", "ring")
_WIDE, _TALL, _LEFT, _LOW, _EDGE = 860, 420, 46, 40, 14
_LONG = 300  # characters of an answer
_MORE = """
svg text { font-size: 11px; fill: var(--ink); }
svg .grid { stroke: var(--line); } svg .front { stroke: var(--ink); fill: none; }
details { margin: .3em 0; } summary { cursor: pointer; }
details td:last-child { white-space: pre-wrap; min-width: 22em; }
"""
_SCRIPT = """
"use strict";
function openTarget() {
  const found = document.getElementById(location.hash.slice(1));
  if (found && found.tagName === "DETAILS") { found.open = true; found.scrollIntoView(); }
}
window.addEventListener("hashchange", openTarget);
openTarget();
"""


def page(sections: Sequence[Section], speeds: Sequence[SpeedRun] = ()) -> str:
    """The page; a part for each model, protocol and length that has scores."""
    parts = []
    for number, section in enumerate(sections):
        view = View(section)
        found = points(view, speeds)
        if found:
            parts.append(_part(number, view, found))
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{TITLE}</title>\n<style>{STYLE}{_MORE}</style>\n</head>\n<body>\n<main>\n"
    )
    body = f"<h1>{TITLE}</h1>\n<p>{escape(ABOUT)}</p>\n" + "\n".join(parts)
    return f"{head}{body}\n</main>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"


def _part(number: int, view: View, found: Sequence[Point]) -> str:
    """One model, protocol and length: picture, table, samples."""
    links = {point.row: f"p{number}-{place}" for place, point in enumerate(found)}
    whole = {
        (task, line.sample): line.score for task in view.tasks for line in view.lines(task, FULL)
    }
    samples = "\n".join(_samples(view, point, links[point.row], whole) for point in found)
    return (
        f"<h2>{escape(view.section.title)}</h2>\n{_picture(found, links)}\n"
        f"{_table(found, links)}\n<h3>Samples</h3>\n{samples}"
    )


def _looks(found: Sequence[Point]) -> dict[str, tuple[str, str]]:
    """Colour and shape of each method; the full cache is black."""
    methods = dict.fromkeys(point.method for point in found if point.method != FULL[0])
    looks = {
        method: (
            _COLOURS[place % len(_COLOURS)],
            _SHAPES[place // len(_COLOURS) % len(_SHAPES)],
        )
        for place, method in enumerate(methods)
    }
    return looks | {FULL[0]: ("var(--ink)", "square")}


def _picture(found: Sequence[Point], links: Mapping[tuple[str, str], str]) -> str:
    """Score by the share held, on a scale of halves."""
    least = max(LEAST, -min(log2(point.share) for point in found if point.share > 0))
    looks, top = _looks(found), ceil(10 * max(point.score.value for point in found)) / 10 or 1.0

    def place(point: Point) -> tuple[float, float]:
        across = 1 + log2(max(point.share, 2.0**-least)) / (least + 0.1)
        x = _LEFT + across * (_WIDE - _LEFT - _EDGE)
        return x, _TALL - _LOW - point.score.value / top * (_TALL - _LOW - _EDGE)

    drawn = []
    for power in range(int(least) + 1):
        x = _LEFT + (1 - power / (least + 0.1)) * (_WIDE - _LEFT - _EDGE)
        name = f"1/{2**power}" if power else "1"
        drawn.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_EDGE}" y2="{_TALL - _LOW}"/>'
        )
        drawn.append(f'<text x="{x:.1f}" y="{_TALL - 22}" text-anchor="middle">{name}</text>')
    for part in range(5):
        y = _TALL - _LOW - part / 4 * (_TALL - _LOW - _EDGE)
        drawn.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDE - _EDGE}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        drawn.append(
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{25 * part * top:.1f}</text>'
        )
    label = "share of the full cache's bytes, measured"
    drawn.append(f'<text x="{_WIDE / 2}" y="{_TALL - 4}" text-anchor="middle">{label}</text>')
    edge = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, front(found, next(iter(COSTS)))))
    drawn.append(f'<polyline class="front" points="{edge}"/>')
    for point in found:
        told = f"{point.method} {point.keep or 'all'}: {100 * point.score.value:.1f}"
        told += f" at {100 * point.share:.1f} %"
        shape = _shape(*place(point), *looks[point.method])
        link = f'<a href="#{links[point.row]}">{shape}<title>{escape(told)}</title></a>'
        drawn.append(link)
    return (
        f'<svg viewBox="0 0 {_WIDE} {_TALL}" role="img" aria-label="Score by share held">'
        + "\n".join(drawn)
        + "</svg>\n<p>"
        + " ".join(_legend(method, *look) for method, look in looks.items())
        + "</p>"
    )


def _shape(x: float, y: float, colour: str, kind: str) -> str:
    style = f'fill="{colour}" fill-opacity="0.75"'
    if kind == "ring":
        style = f'fill="none" stroke="{colour}" stroke-width="2.5"'
    if kind in ("circle", "ring"):
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" {style}/>'
    turned = f' transform="rotate(45 {x:.1f} {y:.1f})"' if kind == "diamond" else ""
    where = f'x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9"'
    return f"<rect {where} {style}{turned}/>"


def _legend(method: str, colour: str, kind: str) -> str:
    mark = f'<svg width="14" height="14">{_shape(7, 7, colour, kind)}</svg>'
    return f"<span>{mark}&nbsp;{escape(method)}</span>"


def _table(found: Sequence[Point], links: Mapping[tuple[str, str], str]) -> str:
    """A row per method, the best mean first; a column per budget."""
    keeps = sorted({point.keep for point in found if point.keep}, key=size_of)
    cells = {point.row: point for point in found}
    methods = dict.fromkeys(point.method for point in found if point.method != FULL[0])

    def order(method: str) -> tuple[int, float]:
        own = [cells[method, keep].score.value for keep in keeps if (method, keep) in cells]
        return -len(own), -fmean(own)

    best = {
        keep: max(point.score.value for point in found if point.keep == keep) for keep in keeps
    }
    headings = []
    for keep in keeps:
        share = median(point.share for point in found if point.keep == keep)
        headings.append(f"<th>{escape(keep)} (1/{1 / max(share, 1e-9):.3g})</th>")
    timed = any(point.ttft_s is not None for point in found)
    headings += ["<th>first token</th><th>tokens/s</th>"] * timed
    rows = []
    for method in sorted(methods, key=order):
        line = [f'<td class="left">{escape(method)}</td>']
        for keep in keeps:
            point = cells.get((method, keep))
            if point is None:
                line.append("<td>-</td>")
                continue
            won = ' class="best"' if point.score.value == best[keep] else ""
            link = f'<a href="#{links[point.row]}">{100 * point.score.value:.1f}</a>'
            low, high = point.score.low, point.score.high
            spread = (
                "" if low is None or high is None else f"({100 * low:.1f} to {100 * high:.1f})"
            )
            line.append(f'<td{won}>{link} <span class="spread">{spread}</span></td>')
        if timed:
            line += _times([cells[method, keep] for keep in keeps if (method, keep) in cells])
        rows.append(f"<tr>{''.join(line)}</tr>")
    whole = cells.get(FULL)
    told = (
        ""
        if whole is None
        else (f'<p>Full cache: <a href="#{links[FULL]}">{100 * whole.score.value:.1f}</a></p>')
    )
    return (
        f'{told}<div class="wide"><table><thead><tr><th class="left">method</th>'
        f"{''.join(headings)}</tr></thead>\n<tbody>\n"
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )


def _times(own: Sequence[Point]) -> list[str]:
    """Of the smallest budget that was timed."""
    point = next((one for one in own if one.ttft_s is not None), None)
    if point is None or point.tokens_per_s is None:
        return ["<td>-</td><td>-</td>"]
    about = f'<span class="spread">keep {escape(point.keep)}</span>'
    first = f"<td>{seconds(point.ttft_s)} {about}</td>"
    return [first, f"<td>{point.tokens_per_s:.1f} {about}</td>"]


def _samples(
    view: View, point: Point, link: str, whole: Mapping[tuple[str, str], float | None]
) -> str:
    """What one point was made of."""
    lines = [line for task in view.tasks for line in view.lines(task, point.row)]
    figures = f"{100 * point.score.value:.1f} at {100 * point.share:.1f} %"
    head = f"{point.method} {point.keep or 'all'}: {figures}, {len(lines)} samples"
    names = ("task", "sample", "score", "full", "loss", "answer")
    sides = ("left", "left", "", "", "", "left")
    titles = "".join(
        f'<th class="{side}">{name}</th>' for name, side in zip(names, sides, strict=True)
    )
    rows = "\n".join(_sample(line, whole.get((line.task, line.sample))) for line in lines)
    return (
        f'<details id="{link}"><summary>{escape(head)}</summary>\n<div class="wide"><table><thead>'
        f"<tr>{titles}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div></details>"
    )


def _sample(line: Line, whole: float | None) -> str:
    """A row: its score beside the full cache's, loss and answer, or why there is none."""
    loss, answer = line.figure("loss"), line.answer or line.reason
    short = answer if len(answer) <= _LONG else f"{answer[:_LONG]} ..."
    figures = (_points(line.score), _points(whole))
    cells = "".join(
        f"<td>{text}</td>" for text in (*figures, "-" if loss is None else f"{loss:.3f}")
    )
    start = "".join(f'<td class="left">{escape(text)}</td>' for text in (line.task, line.sample))
    return f'<tr>{start}{cells}<td class="left">{escape(short)}</td></tr>'


def _points(score: float | None) -> str:
    return "-" if score is None else f"{100 * score:.0f}"
