"""Every kind of panel is drawn, the same for the same figures."""

import pytest

from kvtrim.errors import UsageError
from kvtrim.report.plots import panels

LINES = {
    "kind": "lines",
    "title": "lines",
    "x": "layer",
    "y": "share",
    "series": [
        {"label": "a", "x": [1, 2, 4], "y": [0.1, 0.2, 0.4], "low": [0, 0, 0], "high": [1, 1, 1]},
        {"label": "b", "x": [1, 2], "y": [0.3, 0.1]},
    ],
    "log_x": True,
    "level": 0.2,
    "front": [[1, 4], [0.3, 0.4]],
}
DOTS = {"label": "a", "x": [1.0, 20.0], "y": [1e-6, 3.0], "colour": [0, 1], "names": ["p", "q"]}
POINTS = {"kind": "points", "title": "points", "x": "", "y": "", "bar": "layer", "log_y": True}
MAP = {
    "kind": "map",
    "title": "map",
    "x": "x",
    "y": "y",
    "z": "z",
    "cells": [[1e-3, None], [1, 0.5]],
}
RANKS = {
    "kind": "ranks",
    "title": "ranks",
    "methods": [("a", 1.2), ("b", 2.0), ("c", 2.8)],
    "distance": 1.1,
    "cliques": [(1.2, 2.0)],
}
KINDS = [LINES, POINTS | {"series": [DOTS]}, MAP | {"log": True, "low": 1e-4, "high": 1}, RANKS]


@pytest.mark.parametrize("panel", KINDS, ids=lambda panel: panel["kind"])
def test_a_panel_is_drawn(panel):
    pytest.importorskip("matplotlib")
    assert panels.draw("title", [panel]).startswith(b"\x89PNG")


def test_all_kinds_in_one_picture_the_same_each_time():
    pytest.importorskip("matplotlib")
    drawn = [panels.draw("title\nsubject", KINDS, 2, "svg", "figures") for _ in range(2)]
    assert drawn[0] == drawn[1] and drawn[0].startswith(b"<?xml") and b"figures" in drawn[0]


def test_many_lines_run_through_the_colours_in_order():
    pytest.importorskip("matplotlib")
    many = [{"label": f"layer {at}", "x": [0, 1], "y": [at, at]} for at in range(14)]
    look = panels._looks(LINES | {"series": many, "ordered": True})
    assert len({tuple(one["color"]) for one in look}) == 14
    assert panels.draw("t", [LINES | {"series": many, "ordered": True}])


def test_nothing_to_draw_is_said():
    with pytest.raises(UsageError, match="nothing to draw"):
        panels.draw("title", [])
