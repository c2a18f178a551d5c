"""How well a table of echo foretells held-out texts, as a picture: R^2 of every layer and head."""

from io import BytesIO
from pathlib import Path
from typing import Any

from kvtrim import files
from kvtrim.errors import UsageError

MISSING = 'plots need matplotlib: pip install "kvtrim[plot]"'


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw a fit to a PNG file.

    Args:
        record: what `kvtrim calibrate echo` wrote beside a table.

    Raises:
        UsageError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UsageError(MISSING) from None
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the user's own backend
    axes = figure.subplots()
    heads = list(zip(*record["explained"], strict=True))
    for number, values in enumerate(heads):
        axes.plot(values, marker="o", markersize=3, label=f"KV head {number}")
    axes.axhline(0, color="black", linewidth=0.5)
    held_out = sum(text["tokens"] for text in record["texts"] if text["held_out"])
    axes.set(xlabel="layer", ylabel=f"R² on {held_out:,} held-out tokens", ylim=(None, 1))
    if len(heads) <= 8:
        axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    axes.set_title(f"{record['model']}: the log of {record['target']}'s scores by hidden states")
    picture = BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    try:
        files.replace(path, picture.getvalue())
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error
