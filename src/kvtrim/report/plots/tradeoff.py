"""Quality against bytes held: one line per method, one panel per protocol, as SVG."""

import hashlib
import json
from collections.abc import Mapping, Sequence

from kvtrim.report.plots.style import new_figure, styles, svg

Point = tuple[float, float, float]  # share of the full cache held, mean, standard error
Panels = Mapping[str, Mapping[str, Sequence[Point]]]  # title -> method -> its budgets


def mark_of(panels: Panels) -> str:
    """What a picture of these figures says it was made of."""
    return hashlib.sha256(json.dumps(panels).encode()).hexdigest()


def draw(panels: Panels, across: str, up: str) -> bytes:
    """The picture, the same bytes for the same figures and version of matplotlib.

    Args:
        panels: the figures of each panel, in order; lower is better.
        across, up: what the axes show.

    Raises:
        UsageError: matplotlib is not installed.
    """
    drawn = new_figure(9.0, 4.0)
    look = styles([method for panel in panels.values() for method in panel])
    top = max(y for panel in panels.values() for line in panel.values() for _, y, _ in line)
    for axes, (title, panel) in zip(
        drawn.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items(), strict=True
    ):
        for method, points in panel.items():
            held, means, errors = zip(*sorted(points), strict=True)
            shares = [100 * share for share in held]
            axes.errorbar(shares, means, yerr=errors, label=method, capsize=2, **look[method])
        axes.set(title=title, xlabel=across, xlim=(0, 60), ylim=(-0.05 * top, 1.1 * top))
        axes.axhline(0, color="black", linewidth=0.8)
        axes.grid(alpha=0.3)
    drawn.axes[0].set_ylabel(up)
    drawn.axes[-1].legend(loc="upper right", fontsize=8)
    return svg(drawn, mark_of(panels))
