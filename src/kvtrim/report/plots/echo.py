"""How well a table of echo foretells held-out texts, as a picture: R^2 of every layer and head."""

from pathlib import Path
from typing import Any

from kvtrim.report.plots.style import grid, new_figure, write_png


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw a fit to a PNG file.

    Args:
        record: what `kvtrim calibrate echo` wrote beside a table.

    Raises:
        UsageError: matplotlib is not installed.
        FileError: the file cannot be written.
    """
    figure = new_figure(8, 3.5)
    axes = figure.subplots()
    heads = list(zip(*record["explained"], strict=True))
    for number, values in enumerate(heads):
        axes.plot(values, marker="o", markersize=3, label=f"KV head {number}")
    axes.axhline(0, color="black", linewidth=0.5)
    held_out = sum(text["tokens"] for text in record["texts"] if text["held_out"])
    axes.set(xlabel="layer", ylabel=f"R² on {held_out:,} held-out tokens", ylim=(None, 1))
    if len(heads) <= 8:
        axes.legend(fontsize="small")
    grid(axes)
    axes.set_title(f"{record['model']}: the log of {record['target']}'s scores by hidden states")
    write_png(figure, path)
