"""Pictures of an evaluation are drawn, and methods keep their looks."""

import io

import pytest

pytest.importorskip("matplotlib")
from PIL import Image

from kvtrim.report.plots import evaluation, style

LOOK = style.styles(["full", *(f"m{n}" for n in range(20))])
AXES = {"title": "a title\nand where", "x": "held [%]", "y": "score", "log_x": True}


def size(data):
    return Image.open(io.BytesIO(data)).size


def series(count):
    points = [(10.0, 50.0, 40.0, 60.0), (20.0, 70.0, 70.0, 70.0)]
    own = [{"method": f"m{n}", "points": points} for n in range(count)]
    return [{"method": "full", "points": [(100.0, 80.0, 75.0, 85.0)]}, *own]


def test_methods_are_told_apart_and_look_the_same_everywhere():
    looks = [tuple(style.values()) for style in LOOK.values()]
    assert len(set(looks)) == len(looks) == 22 and LOOK["full"]["color"] == "black"
    assert style.styles(["m0", "full", "m1"])["m1"] == LOOK["m1"]


@pytest.mark.parametrize("count, across", [(1, 1), (7, 1), (8, 2), (20, 3)])
def test_many_methods_get_more_panels(count, across):
    drawn = size(evaluation.draw(AXES | {"kind": "lines", "series": series(count)}, LOOK))
    one = size(evaluation.draw(AXES | {"kind": "lines", "series": series(1)}, LOOK))
    assert (drawn[0] > one[0]) == (across > 1)


def test_shots_stand_side_by_side_and_levels_are_drawn():
    own = [{"method": "m1", "points": [(0, 1.0, 0.5, 1.5), (50, 2.0, 2.0, 2.0)]}]
    picture = {**AXES, "kind": "lines", "series": own, "ticks": [0, 8, 50], "level": 0.0}
    assert evaluation.draw(picture | {"log_x": False}, LOOK).startswith(b"\x89PNG")


def test_heat_maps_and_matrices_leave_missing_cells_open():
    cells = [[1.0, None], [100.0, 50.0]]
    heat = {"kind": "heat", "xs": [1024, 2000], "ys": [0, 100], "z": "score"}
    heat |= {"panels": [{"title": f"m{n}: 50", "cells": cells} for n in range(6)]}
    assert evaluation.draw(AXES | heat, LOOK).startswith(b"\x89PNG")
    matrix = {"kind": "matrix", "rows": ["a", "b"], "columns": ["c", "d"], "z": "score"}
    assert evaluation.draw(AXES | matrix | {"panels": cells}, LOOK).startswith(b"\x89PNG")


def test_lengths_are_short():
    assert [evaluation._short(n) for n in (512, 1024, 2048, 2000, 1536)] == [
        "512", "1k", "2k", "2k", "1.5k",
    ]  # fmt: skip
