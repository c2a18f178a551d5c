"""KVFundaBench's analysis of attention: one map for each kind of task.

Paper: Liu et al. 2025, https://arxiv.org/abs/2502.01941, its section on attention patterns.
Ours:  maps are sums over equal parts of the prompt, so that prompts of any length can be compared;
       a row sums to 1.
"""

from math import log

import torch

from kvtrim.bench.analyses.base import Asked, OfPrompts, spread_layers
from kvtrim.bench.analyses.passes import Pass, blocks, passes
from kvtrim.report.findings import Finding
from kvtrim.types import Float, LayerView, Tensor

_BINS, _SINKS, _NEAR = 48, 4, 64


def heatmap(asked: Asked) -> Finding:
    """Where the queries of each task's prompts look, and how widely."""
    maps: dict[str, list[Tensor]] = {}
    figures: dict[str, list[Tensor]] = {}
    lengths: dict[str, list[int]] = {}
    for one in passes(asked):
        name = one.subject.task.name
        cells, told = prompt_map(one, asked)
        maps.setdefault(name, []).append(cells)
        figures.setdefault(name, []).append(told)
        lengths.setdefault(name, []).append(one.tokens)
    rows = []
    for name, own in figures.items():
        mean = torch.stack(own).mean(dim=0).tolist()
        rows.append([name, len(own), sum(lengths[name]) / len(own), *mean])
    panels = []
    for name, own in maps.items():
        size = min(len(cells) for cells in own)
        cells = torch.stack([part for part in own if len(part) == size]).mean(dim=0)
        marks = [f"{100 * at // size}" for at in range(size)]
        panels.append(
            {
                "kind": "map",
                "title": name,
                "x": "attended position [%]",
                "y": "query's position [%]",
                "z": "attention",
                "cells": [
                    [value if at <= row else None for at, value in enumerate(line)]
                    for row, line in enumerate(cells.clamp(min=1e-6).tolist())
                ],
                "xs": marks,
                "ys": marks,
                "log": True,
                "low": 1e-4,
                "high": 1.0,
            }
        )
    about = (
        f"{asked.about}. Attention of all queries, mean over heads and layers; a row of a map "
        f"sums to 1. Sinks: the share that the first {_SINKS} tokens receive; near: the query's "
        f"own token and the {_NEAR - 1} before it; far: everything else. Entropy: of the weights "
        "of a query, over that of even ones, mean over the queries."
    )
    columns = [("task", "left"), ("prompts", "right"), ("tokens", "right"), ("sinks", "right")]
    columns += [("near", "right"), ("far", "right"), ("entropy", "right")]
    return Finding("Attention by kind of task", about, columns, rows, panels, across=3)


def prompt_map(one: Pass, asked: Asked) -> tuple[Float[Tensor, "bins bins"], Float[Tensor, " 4"]]:
    """A map, and shares on sinks, near and far tokens with the entropy; means over layers."""
    wanted = spread_layers(len(one.layers), len(one.layers), asked.layers)
    found = [layer_map(one.view(index), _BINS) for index in wanted]
    maps, figures = zip(*found, strict=True)
    return torch.stack(maps).mean(dim=0), torch.stack(figures).mean(dim=0)


def layer_map(
    view: LayerView, bins: int
) -> tuple[Float[Tensor, "bins bins"], Float[Tensor, " 4"]]:
    """The same of one layer; queries in blocks, of which only sums stay."""
    count = view.keys.shape[2]
    bins = min(bins, count)
    slot = torch.arange(count, device=view.keys.device)
    place = slot * bins // count
    cells = torch.zeros(bins, bins, dtype=torch.float64, device=view.keys.device)
    figures = torch.zeros(4, dtype=torch.float64, device=view.keys.device)
    for rows, _, weights in blocks(view, slot):
        mean = weights.double().mean(dim=0)  # [r, n]
        across = mean.new_zeros(len(rows), bins).index_add_(1, place, mean)
        cells.index_add_(0, place[rows], across)
        sinks = slot < _SINKS
        near = ~sinks & (slot > rows[:, None] - _NEAR)
        on_sinks, on_near = (mean * sinks).sum(), (mean * near).sum()
        even = torch.log(rows.double() + 1).clamp(min=log(2))
        spread = torch.special.entr(weights.double()).sum(dim=-1).mean(dim=0) / even
        figures += torch.stack([on_sinks, on_near, len(rows) - on_sinks - on_near, spread.sum()])
    counts = torch.bincount(place, minlength=bins)[:, None]
    return (cells / counts).cpu(), (figures / count).cpu()


ANALYSES = (
    OfPrompts(
        "heatmap",
        "KVFundaBench",
        "attention heat maps by task type",
        "where the queries of a prompt look, for each kind of task",
        uses=frozenset({"layer"}),
        compute=heatmap,
    ),
)
