"""Plots of measured rows, as PNG files. Needs matplotlib, which is imported when one is drawn."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvtrim.report.plots.style import entitle, grid, new_figure, plain_marks, write_png

Row = Mapping[str, Any]
Draw = Callable[[Any, list[Row]], bool]
_MARKERS = "osD^vP*X<>"
_IN_A_COLUMN = 20  # names of series below each other beside the plot


def speed(
    rows: Sequence[Row], folder: Path, title: str, look: Mapping[str, Mapping[str, Any]] = {}
) -> list[Path]:
    """First token by prompt length, time per token by entries held, memory by prompt length.

    One set of files per batch size; rows that were not measured are left out. `look` gives methods
    the colours that they have in other pictures (`pictures.styles`).

    Raises:
        UsageError: matplotlib is not installed.
        FileError: a file cannot be written.
    """
    colours = {name: style["color"] for name, style in look.items()}
    good: list[Row] = [
        {**row, "colour": colours.get(row["method"])}
        for row in rows
        if row.get("token_s") is not None
    ]
    made = []
    for batch in dict.fromkeys(row["batch"] for row in good):
        own = [row for row in good if row["batch"] == batch]
        end = "" if batch == 1 else f"-batch{batch}"
        about = title if batch == 1 else f"{title}, {batch} prompts at once"
        for name, draws in _PLOTS.items():
            path = folder / f"{name}{end}.png"
            made += [path] if _plot(draws, own, path, about) else []
    return made


def _plot(draws: Sequence[Draw], rows: list[Row], path: Path, title: str) -> bool:
    """Draw one figure, a panel for each kind, and write it; false if there was nothing to draw."""
    figure = new_figure(6.5 + 3.5 * (len(draws) - 1) + 2, 4.8)
    panels = figure.subplots(1, len(draws), squeeze=False)
    found = [draw(axes, rows) for draw, axes in zip(draws, panels[0], strict=True)]
    if any(found):
        entitle(figure, title)
        for axes in panels[0]:
            grid(axes)
        last = panels[0][-1]
        series = len(last.get_legend_handles_labels()[1])
        last.legend(
            loc="upper left",
            bbox_to_anchor=(1.01, 1.0),
            fontsize=8,
            frameon=False,
            ncols=1 + (series - 1) // _IN_A_COLUMN,
        )
        write_png(figure, path)
    return any(found)


def _by_length(axes: Any, rows: list[Row], value: str, spread: str | None, scale: float) -> bool:
    """A line per method and budget over the prompt length."""
    found = False
    for label, style, own in _series(rows):
        points = sorted((r for r in own if r.get(value) is not None), key=lambda r: r["length"])
        if not points:
            continue
        found = True
        places = [row["length"] for row in points]
        heights = [row[value] / scale for row in points]
        axes.plot(places, heights, label=label, **style)
        if spread is not None:
            _bars(axes, places, heights, [row[spread] for row in points], style)
    _lengths(axes, sorted({row["length"] for row in rows}))
    return found


def _first_token(axes: Any, rows: list[Row]) -> bool:
    axes.set_ylabel("time to first token [s]")
    _logarithmic(axes)
    return _by_length(axes, rows, "ttft_s", "ttft_range_s", 1.0)


def _reading_peak(axes: Any, rows: list[Row]) -> bool:
    axes.set_ylabel("peak above the model, reading [MiB]")
    _logarithmic(axes)
    return _by_length(axes, rows, "peak_bytes", None, 2**20)


def _decode_peak(axes: Any, rows: list[Row]) -> bool:
    axes.set_ylabel("peak above the model, decoding [MiB]")
    _logarithmic(axes)
    return _by_length(axes, rows, "decode_peak_bytes", None, 2**20)


def _logarithmic(axes: Any) -> None:
    """Heights on a logarithmic axis with plain numbers at 1, 2, 5, 10, ..."""
    axes.set_yscale("log")
    plain_marks(axes.yaxis, (1, 2, 5))


def _per_token(axes: Any, rows: list[Row]) -> bool:
    """A point per row: what is held decides, not what was read."""
    for label, style, own in _series(rows):
        points = sorted(own, key=lambda r: r["entries"])
        heights = [row["ms_per_token"] for row in points]
        places = [row["entries"] for row in points]
        axes.plot(places, heights, label=label, **style | {"linewidth": 0.6})
        _bars(axes, places, heights, [row["ms_per_token_range"] for row in points], style)
    axes.set_xlabel("entries held per KV head after the prompt, mean")
    axes.set_ylabel("time per new token [ms]")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(bottom=0)
    return bool(rows)


_PLOTS = {"ttft": [_first_token], "token": [_per_token], "memory": [_reading_peak, _decode_peak]}


def _series(rows: list[Row]) -> list[tuple[str, dict[str, Any], list[Row]]]:
    """Label, style and rows of every method and budget: colour by method, marker by budget."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    keeps = list(dict.fromkeys(row["keep"] for row in rows))
    found = []
    for method in methods:
        for keep in keeps:
            own = [row for row in rows if (row["method"], row["keep"]) == (method, keep)]
            colour = "black" if method == "transformers" else f"C{methods.index(method) % 10}"
            colour = next((row["colour"] for row in own if row.get("colour")), colour)
            marker = _MARKERS[keeps.index(keep) % len(_MARKERS)]
            style = {"color": colour, "marker": marker, "markersize": 5}
            style |= {"markerfacecolor": "none", "linewidth": 1.2}
            found += [(f"{method} {keep}".strip(), style, own)] if own else []
    return found


def _bars(
    axes: Any,
    places: list[float],
    heights: list[float],
    limits: list[Sequence[float]],
    style: dict[str, Any],
) -> None:
    """The least and the most of the rounds."""
    below = [max(0.0, height - low) for height, (low, _) in zip(heights, limits, strict=True)]
    above = [max(0.0, high - height) for height, (_, high) in zip(heights, limits, strict=True)]
    axes.errorbar(
        places, heights, yerr=[below, above], fmt="none", ecolor=style["color"], elinewidth=0.8
    )


def _lengths(axes: Any, lengths: list[int]) -> None:
    """Prompt lengths on a logarithmic axis, each with its own mark."""
    axes.set_xlabel("prompt length [tokens]")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.minorticks_off()
