"""LaProx's analyses: outputs after an eviction, attention against values, what stays.

Paper: https://arxiv.org/abs/2605.07234, sections 3 and 4.
Ours:  outputs are compared on tokens read after the eviction, the same for every method: the
       question where that comes later, and what the full cache goes on with.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from kvtrim.bench.analyses.base import Asked, OfPrompts, spread_layers
from kvtrim.bench.analyses.passes import (
    Pass,
    kept_slots,
    mean_over,
    passes,
    sample,
    spearman,
    window_weights,
)
from kvtrim.hf.attach import attach
from kvtrim.hf.base import BaseCache, cache_keyword
from kvtrim.hf.models.architectures import layout, states_of
from kvtrim.methods.policies import output
from kvtrim.report.findings import Finding
from kvtrim.types import Float, LayerView, Tensor

_AFTER = 16  # tokens that are read after the eviction, where no question is


def cosine(asked: Asked) -> Finding:
    """How like the full cache's the layers' outputs are after an eviction."""
    names = [cell.said for cell in asked.cells]
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    held: dict[str, list[float]] = {name: [] for name in names}
    for one in passes(asked, hidden=True):
        with attach(asked.model):
            after = _continue(asked.model, one)
            whole = outputs(asked.model, one.recording.full.copy(), after)
            for name, cell in zip(names, asked.cells, strict=True):
                cache = one.cache(cell)
                held[name].append(cache.held_bytes / cache.full_bytes)
                own = outputs(asked.model, cache, after)
                found[name].append(_cosines(own, whole))
    means = {name: torch.stack(own).mean(dim=0) for name, own in found.items()}
    layers = list(range(len(next(iter(means.values())))))
    rows = [
        [name, sum(held[name]) / len(held[name]), *(float(x) for x in _summary(own))]
        for name, own in means.items()
    ]
    series = [{"label": name, "x": layers, "y": own.tolist()} for name, own in means.items()]
    panels = [
        {
            "kind": "lines",
            "title": "Output of each decoder layer, with and without eviction",
            "x": "layer",
            "y": "cosine",
            "series": series,
            "level": 1.0,
        }
    ]
    about = (
        f"{asked.about}. The same tokens (the question where it comes after the eviction, and "
        f"what the full cache goes on with, {_AFTER} or more in all) are read after the full "
        "cache and after the evicted one; mean cosine of what each decoder layer gives, over "
        "tokens and prompts. Held: measured bytes over a full cache's."
    )
    columns = [("method", "left"), ("held", "right"), ("mean", "right"), ("least", "right")]
    columns += [("last layer", "right")]
    return Finding(
        "Cosine of layer outputs with and without eviction",
        about,
        columns,
        rows,
        panels,
        across=1,
        more={"cosine": {name: own.tolist() for name, own in means.items()}},
    )


def _summary(cosines: Float[Tensor, " L"]) -> tuple[Tensor, Tensor, Tensor]:
    return cosines.mean(), cosines.min(), cosines[-1]


def _cosines(own: Sequence[Tensor], whole: Sequence[Tensor]) -> Float[Tensor, " L"]:
    pairs = zip(own, whole, strict=True)
    return torch.stack([torch.cosine_similarity(a, b, dim=-1).mean() for a, b in pairs])


def _continue(model: Any, one: Pass) -> list[int]:
    """The question, if that comes later, and what the full cache goes on with, greedily."""
    cache, found = one.recording.full.copy(), list(one.question)
    likely, new = int(one.recording.logits[0].argmax()), found
    while len(found) < _AFTER:
        if new:
            fed = torch.tensor([new], device=model.device)
            with torch.no_grad():
                logits = model(input_ids=fed, **cache_keyword(cache), logits_to_keep=1).logits
            likely = int(logits[0, -1].argmax())
        new = [likely]
        found += new
    return found


def outputs(model: Any, cache: BaseCache, after: Sequence[int]) -> list[Float[Tensor, "q M"]]:
    """What every decoder layer gives for tokens read after a cache; the model is attached."""
    fed = torch.tensor([list(after)], device=model.device)
    with _watch(model) as states, torch.no_grad():
        model(input_ids=fed, **cache_keyword(cache), logits_to_keep=1)
        return [state[0].double().cpu() for state in states]


@contextmanager
def _watch(model: Any) -> Iterator[list[Tensor]]:
    """What the decoder layers give while the block runs."""
    states: list[Tensor] = []

    def keep(module: Any, args: Any, given: Any) -> None:
        states.append(states_of(given))

    hooks = [block.register_forward_hook(keep) for block in layout(model, True).blocks]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


# Attention against what values become behind the output projection.

_SHOWN_LAYERS, _POINTS, _SINKS = 3, 1500, 4


def norms(asked: Asked) -> Finding:
    """Each token's attention beside the norm of its value behind W_O."""
    found: list[list[list[float]]] = []
    layers: list[int] = []
    shown: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for one in passes(asked):
        layers, own = one.layers, []
        wanted = spread_layers(len(layers), _SHOWN_LAYERS, asked.layers)
        for index, view in enumerate(one.views):
            attention, value = both_norms(view, asked.window)
            own.append(_relation(attention, value))
            if index in wanted and index not in shown:
                count = attention.shape[-1] - _SINKS
                some = _SINKS + sample(count, _POINTS // len(attention), asked.seed)
                pairs = [(x[:, :_SINKS], x[:, some]) for x in (attention, value)]
                shown[index] = list(zip(*pairs, strict=True))
        found.append(own)
    rows = [
        [layer, *mean_over(own)]
        for layer, own in zip(layers, zip(*found, strict=True), strict=True)
    ]
    panels = [_scatter(layers[index], own) for index, own in sorted(shown.items())]
    panels.append(
        {
            "kind": "lines",
            "title": "Rank correlation of attention and |v W_O|",
            "x": "layer",
            "y": "Spearman's coefficient",
            "series": [{"label": "", "x": layers, "y": [row[1] for row in rows]}],
            "limits": (-1.02, 1.02),
            "level": 0.0,
        }
    )
    about = (
        f"{asked.about}. Attention: norm of the column of weights that the last {asked.window} "
        "queries give a token before them; value: norm of its value behind the head's part of the "
        "output projection. Rank correlations, mean over query heads, of the two and of each "
        "with their product; sinks: the first four tokens' mean value norm over the others'."
    )
    columns = ["layer", "attention and value", "attention and product", "value and product"]
    columns += ["value norm of sinks"]
    return Finding(
        "Attention against |v W_O|", about, [(name, "right") for name in columns], rows, panels
    )


def both_norms(view: LayerView, window: int) -> tuple[Float[Tensor, "H N"], Float[Tensor, "H N"]]:
    """Of every token before the window: its column of weights, its value behind W_O."""
    count = view.keys.shape[2] - window
    attention = window_weights(view, window)[..., :count].norm(dim=1)
    return attention, output.projected_norms(view)[0][..., :count].to(attention)


def _relation(attention: Float[Tensor, "H N"], value: Float[Tensor, "H N"]) -> list[float]:
    product = attention * value
    pairs = (attention, value), (attention, product), (value, product)
    sinks = value[:, :_SINKS].mean(dim=-1) / value[:, _SINKS:].mean(dim=-1)
    return [*(float(spearman(*pair).mean()) for pair in pairs), float(sinks.mean())]


def _scatter(layer: int, own: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    (sinks, others) = own
    series = []
    for name, (attention, value), size in (("others", others, 5), (f"first {_SINKS}", sinks, 22)):
        good = (attention > 0) & (value > 0)
        x, y = attention[good].tolist(), value[good].tolist()
        series.append({"label": name, "x": x, "y": y, "size": size})
    return {
        "kind": "points",
        "title": f"Layer {layer}",
        "x": "norm of the attention column",
        "y": "|v W_O|",
        "log_x": True,
        "log_y": True,
        "series": series,
    }


def retention(asked: Asked) -> Finding:
    """How many tokens each layer and head keeps."""
    counts: dict[str, list[Tensor]] = {}
    layers: list[int] = []
    for one in passes(asked, hidden=True):
        layers = one.layers
        for cell in asked.cells:
            masks = kept_slots(one.cache(cell))
            own = torch.stack([mask.double().mean(dim=1) for mask in masks])
            counts.setdefault(cell.said, []).append(100 * own)
    means = {name: torch.stack(own).mean(dim=0) for name, own in counts.items()}
    rows = []
    for name, own in means.items():
        by_layer = own.mean(dim=1)
        figures = own.mean(), own.min(), own.max(), by_layer.min(), by_layer.max()
        rows.append([name, *(float(x) for x in figures)])
    high = max(float(own.max()) for own in means.values())
    panels = [
        {
            "kind": "map",
            "title": name,
            "x": "stored head",
            "y": "layer",
            "z": "tokens kept [%]",
            "cells": own.tolist(),
            "xs": list(range(own.shape[1])),
            "ys": layers,
            "low": 0.0,
            "high": high,
        }
        for name, own in means.items()
    ]
    about = (
        f"{asked.about}. The share of the prompt's tokens, in percent, that each layer and head "
        "holds after the eviction, mean over prompts; counted in the cache."
    )
    columns = [("method", "left"), ("mean", "right"), ("least head", "right")]
    columns += [("most head", "right"), ("least layer", "right"), ("most layer", "right")]
    return Finding(
        "Retained tokens per layer and head",
        about,
        columns,
        rows,
        panels,
        across=3,
        more={"kept_percent": {name: own.tolist() for name, own in means.items()}},
    )


_COMPARED = ("laprox", "snapkv", "adakv", "streaming-llm")

ANALYSES = (
    OfPrompts(
        "cosine",
        "LaProx",
        "cosine of layer outputs with and without eviction",
        "how far an eviction turns what each layer gives for tokens to come",
        uses=frozenset({"methods", "keeps"}),
        methods=_COMPARED,
        keeps=("10%",),
        compute=cosine,
    ),
    OfPrompts(
        "norms",
        "LaProx",
        "attention against |v W_O|",
        "whether the tokens with much attention also have large values behind the projection",
        uses=frozenset({"window", "layer", "seed"}),
        compute=norms,
    ),
    OfPrompts(
        "retained",
        "LaProx",
        "retained tokens per layer and head, as a map",
        "how a budget is spread over the layers and heads of a model",
        uses=frozenset({"methods", "keeps"}),
        methods=("laprox", "adakv", "pyramidkv"),
        keeps=("10%",),
        compute=retention,
    ),
)
