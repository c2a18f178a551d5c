"""The curve of `kvtrim calibrate tsp` as a picture: what choosing at each layer does."""

from pathlib import Path
from typing import Any

from kvtrim.report.plots.style import grid, new_figure, write_png

_MARKS = {"marker": "o", "markersize": 3}


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw a table to a PNG file.

    Args:
        found: what `kvtrim calibrate tsp` wrote.

    Raises:
        UsageError: matplotlib is not installed.
        FileError: the file cannot be written.
    """
    layer, figure = found["layer"], new_figure(7, 6.5)
    shares, distances = figure.subplots(2, sharex=True)
    _shares(shares, found)
    _distances(distances, found)
    for axes in (shares, distances):
        axes.axvline(layer, color="black", linestyle=":", linewidth=1, label=f"layer {layer}")
        axes.legend(fontsize="small")
        grid(axes)
    prompts = found["record"]["prompts"]
    figure.suptitle(f"{found['model']}: propagation after each layer, {prompts} prompts")
    write_png(figure, path)


def _shares(axes: Any, found: dict[str, Any]) -> None:
    curve, tokens = found["curve"], found["tokens"]
    layers = [point["layer"] for point in curve]
    lines = {
        "mass": "attention mass on the chosen tokens, at this layer",
        "later": "attention mass on the same tokens, mean of the layers above",
        "overlap": "overlap with what the layers above would choose",
    }
    for name, label in lines.items():
        axes.plot(layers, [point[name] for point in curve], label=label, **_MARKS)
    share = f"{tokens:.0%} of the prompt" if isinstance(tokens, float) else f"{tokens:,}"
    axes.set(ylim=(0, 1.02), ylabel="share (0 to 1)", title=f"chosen tokens: {share}")
    axes.title.set_fontsize("medium")


def _distances(axes: Any, found: dict[str, Any]) -> None:
    curve, limit = found["curve"], found["limit"]
    layers = [point["layer"] for point in curve]
    low, high = ([pick(point["distances"]) for point in curve] for pick in (min, max))
    axes.fill_between(layers, low, high, alpha=0.2, linewidth=0, label="smallest to largest")
    axes.plot(layers, [point["distance"] for point in curve], label="median", **_MARKS)
    axes.axhline(limit, color="grey", linestyle="--", linewidth=1, label=f"limit {limit:.3g}")
    axes.set(
        xlabel=f"layer after which only the chosen tokens go on (of {found['layers']}, from 0)",
        ylabel="L2 distance of the final hidden state,\nrelative to its norm",
        ylim=(0, None),
    )
