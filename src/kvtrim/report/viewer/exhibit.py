"""What was kept of one prompt at several stops, and the page that shows it."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import numpy as np

from kvtrim import files
from kvtrim.errors import UsageError
from kvtrim.report.format import size, visible
from kvtrim.report.viewer.evidence import Evidence
from kvtrim.report.viewer.pack import pack_numbers, pack_runs, places_within

_HEIGHT = 760  # of the frame in a notebook, pixels


@dataclass(frozen=True)
class Said:
    """An answer at a stop."""

    text: str
    log_prob: float | None = None  # of the reference answer, nats, all its tokens together


@dataclass(frozen=True)
class Stop:
    """What one method holds of the prompt at one budget."""

    method: str
    keep: str
    positions: Sequence[Sequence[np.ndarray]]  # [layer][head]: ascending token numbers [entries]
    held_bytes: int
    full_bytes: int
    remark: str | None = None
    said: Said | None = None

    @property
    def heads(self) -> list[np.ndarray]:
        """Those of all layers, one after the other."""
        return [head for layer in self.positions for head in layer]

    def tally(self, tokens: int) -> np.ndarray:
        """How many heads keep each token, [tokens]."""
        found = np.zeros(tokens, np.int64)
        for head in self.heads:
            found[head] += 1
        return found


@dataclass(frozen=True)
class Exhibit:
    """What was kept of a prompt; shown by a notebook, or saved as one HTML file.

    Args:
        pieces: the text that each token of the prompt stands for.
        stops: every method at every budget.
        about: what the reader is told of where it comes from; each a sentence without its stop.
        layers: the model's numbers of the layers in the stops.
        question, reference: what was asked, and the answer whose log-probability the stops give.

    Raises:
        UsageError: there is no stop, or one that holds what the prompt does not have.
    """

    pieces: Sequence[str]
    stops: Sequence[Stop]
    about: Sequence[str] = ()
    layers: Sequence[int] = ()
    question: str | None = None
    reference: str | None = None
    evidence: Sequence[Evidence] = ()

    def __post_init__(self) -> None:
        if not self.stops or not self.pieces:
            raise UsageError("there is nothing to show: nothing was read yet")
        for stop in self.stops:
            ends = [head[-1] for head in stop.heads if len(head)]
            if len(stop.positions) != len(self.layers) or max(ends, default=0) >= len(self.pieces):
                raise UsageError(
                    f"what {stop.method} kept is not of these {len(self.pieces)} tokens"
                )

    @cached_property
    def html(self) -> str:
        """The page, which needs no other file and no network."""
        text = resources("kvtrim.report.viewer").joinpath("page.html").read_text("utf-8")
        title = escape(f"What was kept of {len(self.pieces):,} tokens")
        before, _, after = text.replace("@TITLE@", title).partition("@DATA@")
        data = json.dumps(self._data(), ensure_ascii=False, separators=(",", ":"))
        return before + data.replace("<", "\\u003c") + after

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page to a file, whole or not at all.

        Raises:
            FileError: it cannot be written.
        """
        files.replace(Path(path), self.html.encode())

    def _repr_html_(self) -> str:
        """In a notebook: the page in a frame of its own, which sees nothing of the notebook."""
        return (
            f'<iframe sandbox="allow-scripts" title="What was kept" srcdoc="{escape(self.html)}" '
            f'style="width:100%;height:{_HEIGHT}px;border:0"></iframe>'
        )

    def _data(self) -> dict[str, Any]:
        shown = [visible(piece) for piece in self.pieces]
        units = [len(piece.encode("utf-16-le")) // 2 for piece in shown]  # as scripts count them
        return {
            "tokens": len(shown),
            "text": "".join(shown),
            "lengths": pack_numbers(units),
            "about": [visible(each) for each in self.about],
            "layers": list(self.layers),
            "question": None if self.question is None else visible(self.question),
            "reference": None if self.reference is None else visible(self.reference),
            "evidence": [[each.start, each.end, each.given] for each in self.evidence],
            "budgets": self._budgets(),
            "stops": [self._stop(stop) for stop in self.stops],
        }

    def _budgets(self) -> list[str]:
        """The budgets, what holds least first; the full cache has none."""
        held: dict[str, list[float]] = {}
        for stop in self.stops:
            if stop.keep != "all":
                held.setdefault(stop.keep, []).append(_entries(stop) / len(stop.heads))
        return sorted(held, key=lambda keep: sum(held[keep]) / len(held[keep]))

    def _stop(self, stop: Stop) -> dict[str, Any]:
        needed = sorted({at for each in self.evidence for at in range(each.start, each.end)})
        marked = stop.tally(len(self.pieces))[needed] if needed else np.zeros(0)
        said = stop.said
        return {
            "method": visible(stop.method),
            "keep": visible(stop.keep),
            "entries": [[len(head) for head in layer] for layer in stop.positions],
            **self._runs(stop),
            "held": size(stop.held_bytes),
            "full": size(stop.full_bytes),
            "share": f"{100 * stop.held_bytes / stop.full_bytes:.1f} %" if stop.full_bytes else "",
            "remark": stop.remark and visible(stop.remark),
            "said": None if said is None else visible(said.text),
            "logProb": None if said is None or said.log_prob is None else f"{said.log_prob:.2f}",
            "evidence": _shares(marked, len(stop.heads)),
        }

    def _runs(self, stop: Stop) -> dict[str, Any]:
        """What a stop keeps, if it can be among what the method's next larger budget keeps."""
        size = _entries(stop)
        rest = [n for n, each in enumerate(self.stops) if each.method == stop.method]
        larger = [
            n for n in rest if _entries(self.stops[n]) > size and self.stops[n].keep != "all"
        ]
        if larger:
            parent = min(larger, key=lambda n: _entries(self.stops[n]))
            places = places_within(stop.heads, self.stops[parent].heads)
            if places is not None:
                return {"runs": pack_runs(places), "within": parent}
        return {"runs": pack_runs(stop.heads), "within": None}


def _shares(marked: np.ndarray, heads: int) -> list[float] | None:
    """Of the tokens of the evidence: the mean share of heads that keep one, those lost, all."""
    if not len(marked):
        return None
    return [float(marked.mean()) / heads, int((marked == 0).sum()), len(marked)]


def _entries(stop: Stop) -> int:
    return sum(map(len, stop.heads))
