"""The figure of an analysis: panels of lines, points, maps and ranks, in one style."""

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any, Literal

from kvtrim.errors import UsageError
from kvtrim.report.plots.style import (
    MAP,
    entitle,
    fill_lines,
    grid,
    new_figure,
    plain_marks,
    png,
    styles,
    svg,
)

Panel = Mapping[str, Any]
Format = Literal["png", "svg"]
_WIDE, _TALL = 4.9, 3.9
_FAR = 3000  # from the least to the most on an axis whose marks are plain numbers
_FEW = 10  # lines that a legend can name


def draw(
    title: str, panels: Sequence[Panel], across: int = 2, form: Format = "png", about: str = ""
) -> bytes:
    """One picture; SVG is the same bytes for the same panels and version of matplotlib.

    Args:
        panels: as `kvtrim.report.findings` says.
        across: panels beside each other.

    Raises:
        UsageError: matplotlib is not installed, or there is nothing to draw.
    """
    if not panels:
        raise UsageError("there is nothing to draw")
    across = min(across, len(panels))
    down = ceil(len(panels) / across)
    tall = sum(_height(panels[at : at + across]) for at in range(0, len(panels), across))
    figure = new_figure(max(6.5, _WIDE * across), tall + 0.4)
    heights = [_height(panels[at : at + across]) for at in range(0, len(panels), across)]
    boxes = figure.subplots(down, across, squeeze=False, height_ratios=heights).ravel()
    for axes, panel in zip(boxes, panels, strict=False):
        axes.set_title(fill_lines(panel["title"], 52), fontsize=9)
        axes.tick_params(labelsize=8)
        _KINDS[panel["kind"]](axes, panel)
    for axes in boxes[len(panels) :]:
        axes.set_visible(False)
    entitle(figure, title)
    return png(figure) if form == "png" else svg(figure, about)


def _height(panels: Sequence[Panel]) -> float:
    """Of a row of panels, in inches."""
    return max(
        0.9 + 0.16 * len(panel["methods"]) if panel["kind"] == "ranks" else _TALL
        for panel in panels
    )


def _axes(axes: Any, panel: Panel) -> None:
    axes.set_xlabel(panel["x"], fontsize=9)
    axes.set_ylabel(panel["y"], fontsize=9)


def _scales(axes: Any, panel: Panel) -> None:
    for asked, scale in (("log_x", axes.set_xscale), ("log_y", axes.set_yscale)):
        if panel.get(asked):
            scale("log")
            _plain(axes.xaxis if asked == "log_x" else axes.yaxis)
    if "ticks" in panel:
        axes.set_xticks(panel["ticks"], [f"{tick:g}" for tick in panel["ticks"]])
        axes.minorticks_off()
    if "level" in panel:
        axes.axhline(panel["level"], color="black", linewidth=0.8, linestyle=":")
    if "limits" in panel:
        axes.set_ylim(*panel["limits"])
    grid(axes)


def _plain(axis: Any) -> None:
    """Marks of a logarithmic axis as plain numbers, powers where it spans many of them."""
    low, high = axis.get_view_interval()
    spans = high / max(low, 1e-300)
    if spans > _FAR:
        return
    plain_marks(axis, (1, 2, 5) if spans > 6 else (1, 1.5, 2, 3, 4, 6, 8))


def _bar(image: Any, axes: Any, label: str) -> None:
    """What the colours of a panel mean."""
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.9, aspect=30, pad=0.01)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _looks(panel: Panel) -> list[dict[str, Any]]:
    """Colours that run with the order of the series where there is one, else one for each name."""
    series = panel["series"]
    if not panel.get("ordered"):
        look = styles([one["label"] for one in series])
        return [dict(look[one["label"]]) for one in series]
    from matplotlib import colormaps

    steps = max(1, len(series) - 1)
    shades = [colormaps[MAP](0.95 * number / steps) for number in range(len(series))]
    return [{"color": shade, "marker": "o", "linestyle": "-"} for shade in shades]


def _lines(axes: Any, panel: Panel) -> None:
    many = max((len(one["x"]) for one in panel["series"]), default=0) > 40
    for one, look in zip(panel["series"], _looks(panel), strict=True):
        look["marker"] = "" if many else look["marker"]
        look["label"] = one["label"]
        axes.plot(one["x"], one["y"], markersize=4, linewidth=1.3, **look)
        if "low" in one:
            colour = look["color"]
            axes.fill_between(
                one["x"], one["low"], one["high"], color=colour, alpha=0.15, linewidth=0
            )
    if "front" in panel:
        axes.plot(*panel["front"], color="black", linewidth=1, linestyle=":", label="front")
    _axes(axes, panel)
    _scales(axes, panel)
    _legend(axes, panel)


def _legend(axes: Any, panel: Panel) -> None:
    count = len(panel["series"])
    if 1 < count <= _FEW:
        axes.legend(fontsize=7, framealpha=0.7)
    elif count > _FEW:
        axes.legend(fontsize=6, frameon=False, ncols=2, loc="upper left", bbox_to_anchor=(1, 1))


def _points(axes: Any, panel: Panel) -> None:
    shades = None
    for one, look in zip(panel["series"], _looks(panel), strict=True):
        coloured = "colour" in one
        colour = {"c": one["colour"], "cmap": MAP} if coloured else {"color": look["color"]}
        dots = axes.scatter(
            one["x"],
            one["y"],
            s=one.get("size", 9),
            marker=one.get("marker", "o"),
            alpha=one.get("alpha", 0.6),
            linewidths=0,
            label=one["label"],
            **colour,
        )
        shades = dots if coloured else shades
        for x, y, text in zip(one["x"], one["y"], one.get("names", []), strict=False):
            axes.annotate(text, (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
    if shades is not None:
        _bar(shades, axes, panel["bar"])
    _axes(axes, panel)
    _scales(axes, panel)
    if len(panel["series"]) > 1:
        axes.legend(fontsize=7, framealpha=0.7, markerscale=1.5)


def _map(axes: Any, panel: Panel) -> None:
    from matplotlib.colors import LogNorm

    cells = [[float("nan") if cell is None else cell for cell in row] for row in panel["cells"]]
    low, high = panel.get("low"), panel.get("high")
    norm = LogNorm(low, high) if panel.get("log") else None
    limits = {} if norm is not None else {"vmin": low, "vmax": high}
    image = axes.imshow(
        cells, cmap=MAP, aspect="auto", norm=norm, interpolation="nearest", **limits
    )
    _axes(axes, panel)
    for names, put, count in (
        (panel.get("xs"), axes.set_xticks, len(cells[0])),
        (panel.get("ys"), axes.set_yticks, len(cells)),
    ):
        if names is not None:
            places = range(0, count, max(1, ceil(count / 12)))
            put(list(places), [str(names[place]) for place in places])
    _bar(image, axes, panel["z"])


def _ranks(axes: Any, panel: Panel) -> None:
    """A critical-difference diagram: ranks on a line, names beside it, bars over equals."""
    methods, cliques = sorted(panel["methods"], key=lambda one: one[1]), panel["cliques"]
    count = len(methods)
    half, bars = ceil(count / 2), len(cliques)
    top, step = 0.0, 1.0
    axes.set_axis_off()
    axes.set_xlim(0.2 - 0.28 * count, count + 0.8 + 0.28 * count)
    axes.plot([1, count], [top, top], color="black", linewidth=1)
    for rank in range(1, count + 1):
        axes.plot([rank, rank], [top, top + 0.25], color="black", linewidth=1)
        axes.text(rank, top + 0.35, str(rank), ha="center", va="bottom", fontsize=8)
    width = panel["distance"]
    axes.plot([1, 1 + width], [top + 2, top + 2], color="black", linewidth=1.5)
    axes.text(
        1 + width / 2, top + 2.15, f"critical difference {width:.2f}", ha="center", fontsize=8
    )
    first = top - 1 - 0.5 * bars
    for place, (name, rank) in enumerate(methods):
        left = place < half
        y = first - step * (place if left else count - 1 - place)
        x, end = (0.6, "right") if left else (count + 0.4, "left")
        axes.plot([rank, rank, x], [top, y, y], color="#555555", linewidth=0.8)
        axes.text(x, y, f" {name} ({rank:.2f}) ", ha=end, va="center", fontsize=8)
    for number, (low, high) in enumerate(cliques):
        y = top - 0.45 - 0.5 * number
        axes.plot([low - 0.05, high + 0.05], [y, y], color="#0072B2", linewidth=3)
    axes.set_ylim(first - step * half, top + 3)


_KINDS: Mapping[str, Callable[[Any, Panel], None]] = {
    "lines": _lines,
    "points": _points,
    "map": _map,
    "ranks": _ranks,
}
