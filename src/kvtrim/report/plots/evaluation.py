"""Pictures of an evaluation: lines over budgets, heat maps, methods by tasks."""

from collections.abc import Mapping
from math import ceil
from typing import Any

from kvtrim.report.plots.style import MAP, entitle, grid, new_figure, plain_marks, png

_IN_A_PANEL, _ACROSS = 7, 3  # methods, panels
_HEATS_ACROSS = 5
_FEW, _MANY, _FAR = (1, 2, 5), (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8), 6  # marks of a logarithmic axis
_ASIDE = 0.015  # between two methods, as a share of the place or of a step
Picture = Mapping[str, Any]


def draw(picture: Picture, look: Mapping[str, Mapping[str, Any]]) -> bytes:
    """One picture as PNG.

    Args:
        picture: what `kvtrim.report.figures_data` says of it.
        look: what `styles` made of the names of all methods in the report.

    Raises:
        UsageError: matplotlib is not installed.
    """
    figure = _KINDS[picture["kind"]](picture, look)
    entitle(figure, picture["title"])
    return png(figure)


def _lines(picture: Picture, look: Mapping[str, Mapping[str, Any]]) -> Any:
    """Panels of a few methods each, on the same axes; the full cache in all of them."""
    full = [one for one in picture["series"] if one["method"] == "full"]
    others = [one for one in picture["series"] if one["method"] != "full"]
    count = max(1, ceil(len(others) / _IN_A_PANEL))
    size = max(1, ceil(len(others) / count))
    groups = [others[at : at + size] for at in range(0, len(others), size)] or [[]]
    across = 2 if len(groups) in (2, 4) else min(len(groups), _ACROSS)
    down = ceil(len(groups) / across)
    figure = new_figure(max(7.0, 4.6 * across), 4.6 * down + 0.5)
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, group in zip(panels, groups, strict=False):
        for place, one in enumerate([*full, *group]):
            _line(axes, one, look[one["method"]], place - len(group) / 2, picture)
        _dress(axes, picture)
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, fontsize=8, frameon=False
        )
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    return figure


def _line(
    axes: Any, one: Mapping[str, Any], style: Mapping[str, Any], place: float, picture: Picture
) -> None:
    """One method; moved a little to the side so that the intervals of several can be told."""
    places, heights, lows, highs = (list(column) for column in zip(*one["points"], strict=True))
    if "ticks" in picture:
        places = [picture["ticks"].index(x) + _ASIDE * place for x in places]
    elif one["method"] != "full":
        places = [x * (1 + _ASIDE * place) for x in places]
    below = [max(0.0, y - low) for y, low in zip(heights, lows, strict=True)]
    above = [max(0.0, high - y) for y, high in zip(heights, highs, strict=True)]
    axes.errorbar(
        places,
        heights,
        yerr=[below, above],
        label=one["method"],
        markersize=5,
        markerfacecolor="none",
        linewidth=1.3,
        elinewidth=0.8,
        capsize=2,
        **style,
    )
    if one["method"] == "full" and len(places) == 1:
        axes.axhline(heights[0], color="black", linewidth=0.8, linestyle=":")


def _dress(axes: Any, picture: Picture) -> None:
    """Scales, labels and grid."""
    axes.set_xlabel(picture["x"], fontsize=9)
    axes.set_ylabel(picture["y"], fontsize=9)
    axes.tick_params(labelsize=8, labelbottom=True, labelleft=True)
    grid(axes)
    if "level" in picture:
        axes.axhline(picture["level"], color="black", linewidth=0.8, linestyle=":")
    if "ticks" in picture:
        axes.set_xticks(range(len(picture["ticks"])), [f"{tick:g}" for tick in picture["ticks"]])
    for asked, axis, scale in (
        ("log_x", axes.xaxis, axes.set_xscale),
        ("log_y", axes.yaxis, axes.set_yscale),
    ):
        if picture.get(asked):
            scale("log")
            low, high = axis.get_view_interval()
            marks = _FEW if high > _FAR * low else _MANY
            plain_marks(axis, marks, numticks=20)


def _heat(picture: Picture, look: Mapping[str, Mapping[str, Any]]) -> Any:
    """A panel per method: lengths across, depths down, one scale of colours for all."""
    panels = picture["panels"]
    across = min(len(panels), _HEATS_ACROSS)
    down = ceil(len(panels) / across)
    wide = max(1.9, 0.42 * len(picture["xs"]) + 0.7)
    tall = max(1.7, 0.22 * len(picture["ys"]) + 0.8)
    figure = new_figure(max(6.0, wide * across + 1.2), tall * down + 1.0)
    boxes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    image = None
    for axes, panel in zip(boxes.flat, panels, strict=False):
        cells = [
            [float("nan") if cell is None else cell for cell in line] for line in panel["cells"]
        ]
        image = axes.imshow(cells, vmin=0, vmax=100, cmap=MAP, aspect="auto")
        axes.set_title(panel["title"], fontsize=8)
        axes.set_xticks(range(len(picture["xs"])), [_short(x) for x in picture["xs"]])
        axes.set_yticks(range(len(picture["ys"])), [f"{y:g}" for y in picture["ys"]])
        axes.tick_params(labelsize=7, labelbottom=True)
        axes.tick_params(axis="x", rotation=45 if len(picture["xs"]) > 4 else 0)
    for axes in list(boxes.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel(picture["x"], fontsize=9)
    figure.supylabel(picture["y"], fontsize=9)
    figure.colorbar(image, ax=boxes, label=picture["z"], shrink=0.6, aspect=30, pad=0.01)
    return figure


def _short(tokens: float) -> str:
    """A length in a narrow place: 2k (2048 as well as 2000), 1.5k, 512."""
    unit = 1024 if tokens % 256 == 0 else 1000
    return f"{tokens / unit:.3g}k" if tokens >= 1000 else f"{tokens:g}"


def _matrix(picture: Picture, look: Mapping[str, Mapping[str, Any]]) -> Any:
    """Methods down, tasks across, the score in every cell."""
    rows, columns = picture["rows"], picture["columns"]
    figure = new_figure(max(6.0, 0.62 * len(columns) + 2.6), 0.27 * len(rows) + 2.1)
    axes = figure.subplots()
    numbers = [
        [float("nan") if cell is None else cell for cell in line] for line in picture["panels"]
    ]
    image = axes.imshow(numbers, vmin=0, vmax=100, cmap=MAP, aspect="auto")
    for y, line in enumerate(picture["panels"]):
        for x, cell in enumerate(line):
            colour = "white" if cell is not None and cell < 50 else "black"
            text = "-" if cell is None else f"{cell:.0f}"
            axes.text(x, y, text, ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(labelsize=8)
    figure.colorbar(image, label=picture["z"], aspect=30, pad=0.01)
    return figure


_KINDS = {"lines": _lines, "heat": _heat, "matrix": _matrix}
