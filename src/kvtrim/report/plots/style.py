"""How every picture looks: colours, sizes, axes and files. Needs matplotlib, loaded when drawing.

A method has one colour, marker and kind of line in all pictures of a report. Colours are those of
Okabe and Ito, which people with colour-blindness tell apart; maps run from dark to light.
"""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from textwrap import fill
from typing import Any

from kvtrim import files
from kvtrim.errors import UsageError

MAP = "cividis"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5C00")
_MARKERS, _LINES = "osD^vP*Xhd<>", ("-", "--", ":", "-.")
_DPI, _PALETTE = 120, 128  # and colours of a picture
_LAYOUT = "constrained"  # what is drawn is measured first, so that nothing overlaps
_TITLE = 13  # letters of a title in an inch


def styles(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How each method looks; the full cache is black, plain transformers grey."""
    known: dict[str, dict[str, Any]] = {
        "full": {"color": "black", "marker": "s", "linestyle": "-"},
        "transformers": {"color": "#777777", "marker": "x", "linestyle": "-"},
    }
    found: dict[str, dict[str, Any]] = {}
    for number, method in enumerate(dict.fromkeys(name for name in methods if name not in known)):
        found[method] = {
            "color": _COLOURS[number % len(_COLOURS)],
            "marker": _MARKERS[number % len(_MARKERS)],
            "linestyle": _LINES[number // len(_COLOURS) % len(_LINES)],
        }
    return found | known


def new_figure(width: float, height: float) -> Any:
    """An empty figure of that size in inches, in no window; UsageError without matplotlib."""
    try:
        import matplotlib.figure
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise UsageError("plots need matplotlib: pip install 'kvtrim[plot]'") from None
    figure = matplotlib.figure.Figure(figsize=(width, height), layout=_LAYOUT)
    FigureCanvasAgg(figure)  # no window, whatever the user's own backend
    return figure


def fill_lines(text: str, width: int) -> str:
    """Every line of a text broken where it is too long."""
    return "\n".join(fill(line, width) for line in text.split("\n"))


def entitle(figure: Any, title: str) -> None:
    """A title over a figure, in as many lines as it needs."""
    figure.suptitle(fill_lines(title, int(_TITLE * figure.get_figwidth())), fontsize=10)


def grid(axes: Any) -> None:
    """Thin lines behind what is drawn."""
    axes.grid(visible=True, which="major", linewidth=0.4, alpha=0.6)


def plain_marks(axis: Any, subs: Sequence[float], **more: Any) -> None:
    """Marks of a logarithmic axis as plain numbers, at these multiples of powers of ten."""
    axis.get_major_locator().set_params(subs=subs, **more)
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def png(figure: Any) -> bytes:
    """A figure as PNG with a palette, a third of the bytes."""
    from PIL import Image  # matplotlib brings it

    drawn, out = BytesIO(), BytesIO()
    figure.savefig(drawn, dpi=_DPI, format="png")
    drawn.seek(0)
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(_PALETTE, dither=Image.Dither.NONE).save(
            out, "PNG", optimize=True
        )
    return out.getvalue()


def svg(figure: Any, about: str) -> bytes:
    """A figure as SVG, the same bytes for the same figure and version of matplotlib."""
    import matplotlib

    out = BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "kvtrim", "svg.fonttype": "none"}):
        about_it = {"Date": None, "Description": about}
        figure.savefig(out, dpi=_DPI, format="svg", metadata=about_it)
    return out.getvalue()


def write_png(figure: Any, path: Path) -> None:
    """Put a figure into a file.

    Raises:
        FileError: it cannot be written.
    """
    files.replace(path, png(figure))
