"""CircuitKV's analysis: where a walk along a prompt's attention goes, and where it ends.

Paper: none; the chain is that of the public code, see `kvtrim.methods.policies.circuitkv`.
Ours:  charge is the expected number of visits from the newest token, absorption the chance that
       such a walk has reached one of the sinks after so many steps.
"""

from collections.abc import Sequence
from math import ceil

import torch

from kvtrim.bench.analyses.base import Asked, OfPrompts, spread_layers
from kvtrim.bench.analyses.passes import mean_over, passes, window_weights
from kvtrim.errors import UsageError
from kvtrim.methods.policies.circuitkv import CircuitKV, arrivals
from kvtrim.report.findings import Finding
from kvtrim.types import Float, LayerView, Tensor

_BINS, _SHOWN_LAYERS, _TOP = 64, 5, 0.1


def charge(asked: Asked) -> Finding:
    """Visits by position in every layer, and how soon walks are absorbed."""
    policy = CircuitKV()
    found: list[list[list[float]]] = []
    maps: list[Tensor] = []
    curves: list[Tensor] = []
    layers: list[int] = []
    for one in passes(asked):
        layers = one.layers
        walks = [walk(view, policy) for view in one.views]
        found.append([_figures(visits, absorbed) for visits, absorbed in walks])
        maps.append(torch.stack([parts_of(visits, _BINS) for visits, _ in walks]))
        curves.append(torch.stack([absorbed for _, absorbed in walks]))
    rows = [
        [layer, *mean_over(own)]
        for layer, own in zip(layers, zip(*found, strict=True), strict=True)
    ]
    visits, ends = torch.stack(maps).mean(dim=0), torch.stack(curves).mean(dim=0)
    some = spread_layers(len(layers), _SHOWN_LAYERS, asked.layers)
    labels = [f"{100 * at // visits.shape[-1]}" for at in range(visits.shape[-1])]
    panels = []
    for side, title in enumerate(("from the newest token", "from anywhere")):
        cells = visits[:, side]
        panels.append(
            {
                "kind": "map",
                "title": f"Charge: visits {title}",
                "x": "position [% of the prompt]",
                "y": "layer",
                "z": "share of a walk's visits",
                "cells": cells.clamp(min=1e-6).tolist(),
                "xs": labels,
                "ys": layers,
                "log": True,
                "low": 1e-5,
                "high": 1.0,
            }
        )
    steps = list(range(ends.shape[-1]))
    for side, title in enumerate(("from the newest token", "from anywhere")):
        series = [
            {"label": f"layer {layers[at]}", "x": steps, "y": ends[at, side].tolist()}
            for at in some
        ]
        panels.append(
            {
                "kind": "lines",
                "title": f"Absorption of walks {title}",
                "x": "steps",
                "y": "chance to have reached a sink",
                "series": series,
                "ordered": True,
                "limits": (0, 1.02),
            }
        )
    about = (
        f"{asked.about}. Walks of {policy.steps} steps along the attention of the last "
        f"{policy.window} queries (its largest over heads); the first {policy.sinks} tokens "
        f"absorb. Top: the share of the visits that the {_TOP:.0%} of tokens with most of them "
        "have; absorbed: the chance to have reached a sink in the end; newest is from the newest "
        "token, anywhere from a token drawn alike."
    )
    columns = ["layer", f"top {_TOP:.0%}, newest", f"top {_TOP:.0%}, anywhere"]
    columns += ["absorbed, newest", "absorbed, anywhere"]
    return Finding(
        "Charge and absorption of a prompt",
        about,
        [(name, "right") for name in columns],
        rows,
        panels,
        more={"absorbed": ends.tolist(), "layers": layers},
    )


def walk(
    view: LayerView, policy: CircuitKV
) -> tuple[Float[Tensor, "2 S"], Float[Tensor, "2 steps"]]:
    """Visits of each token, sinks left out, and the chance to be absorbed by each step.

    Raises:
        UsageError: nothing stands between sinks and window.
    """
    count = view.keys.shape[2]
    if count <= policy.sinks + policy.window:
        raise UsageError(
            f"a prompt of {count} tokens has none between {policy.sinks} sinks and the window of "
            f"{policy.window}; give a longer text"
        )
    surface = window_weights(view, policy.window).amax(dim=0)[None]
    lengths = torch.tensor([count], device=surface.device)
    visits, ends = None, []
    for now in arrivals(surface, lengths, policy.sinks, policy.steps, policy.temperature):
        visits = now[0].clone() if visits is None else visits + now[0]
        ends.append(now[0, :, : policy.sinks].sum(dim=-1))
    assert visits is not None  # a walk has a start
    visits[:, : policy.sinks] = 0
    return visits.cpu(), torch.stack(ends, dim=-1).cumsum(dim=-1).cpu()


def _figures(visits: Float[Tensor, "2 S"], absorbed: Float[Tensor, "2 steps"]) -> list[float]:
    top = visits.topk(ceil(_TOP * visits.shape[-1]), dim=-1).values.sum(dim=-1)
    return [*(top / visits.sum(dim=-1)).tolist(), *absorbed[:, -1].tolist()]


def parts_of(visits: Float[Tensor, "2 S"], bins: int) -> Float[Tensor, "2 bins"]:
    """Shares of all visits that fall on equal parts of the prompt."""
    count = visits.shape[-1]
    bins = min(bins, count)
    place = torch.arange(count) * bins // count
    sums = visits.new_zeros(2, bins).index_add_(1, place, visits)
    return sums / sums.sum(dim=-1, keepdim=True)


ANALYSES: Sequence[OfPrompts] = (
    OfPrompts(
        "charge",
        "CircuitKV",
        "charge and absorption of a prompt",
        "which tokens walks along the attention visit, and how soon they end in the sinks",
        uses=frozenset({"layer"}),
        compute=charge,
    ),
)
