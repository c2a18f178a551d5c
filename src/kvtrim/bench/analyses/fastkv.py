"""FastKV's analyses: where attention falls, whether layers agree, what leaving tokens behind does.

Paper: Jo et al. 2025, https://arxiv.org/abs/2502.01068, sections 3 and 4.
Ours:  attention is that of the last queries, over all heads; distances are relative to the norm;
       the tokens that count are those that `fastkv` itself would send on.
"""

from collections.abc import Sequence
from math import ceil
from statistics import fmean, median

import torch

from kvtrim.bench.analyses.base import Asked, OfPrompts, spread_layers
from kvtrim.bench.analyses.passes import Pass, passes, window_weights
from kvtrim.bench.calibrate.tsp import METHOD, Final, empty_cache, full_prefill, narrowed_prefill
from kvtrim.errors import UsageError
from kvtrim.hf.attach import attach
from kvtrim.methods.settings import find
from kvtrim.report.findings import Finding
from kvtrim.types import Tensor

SHARES = (0.01, 0.05, 0.1, 0.2)
MOST = 0.9  # of the attention: how many tokens hold it
SINKS = 4


def mass(asked: Asked) -> Finding:
    """The share of each layer's attention that its most attended tokens receive."""
    found: list[list[list[float]]] = []
    layers: list[int] = []
    for one in passes(asked):
        layers = one.layers
        found.append([_masses(one, index, asked.window) for index in range(len(layers))])
    rows = [
        [layer, *(fmean(column) for column in zip(*own, strict=True))]
        for layer, own in zip(layers, zip(*found, strict=True), strict=True)
    ]
    names = [f"top {share:.0%}" for share in SHARES]
    series = [
        {"label": name, "x": layers, "y": [row[1 + at] for row in rows]}
        for at, name in enumerate([*names, f"first {SINKS} tokens"])
    ]
    needed = {"label": "", "x": layers, "y": [100 * float(row[-1]) for row in rows]}
    panels = [
        {
            "kind": "lines",
            "title": "Attention mass of each layer's own top tokens",
            "x": "layer",
            "y": f"share of the attention of the last {asked.window} queries",
            "series": series,
            "limits": (0, 1.02),
        },
        {
            "kind": "lines",
            "title": f"Tokens that hold {MOST:.0%} of the attention",
            "x": "layer",
            "y": "share of the prompt [%]",
            "series": [needed],
            "limits": (0, None),
        },
    ]
    about = (
        f"{asked.about}. Attention of the last {asked.window} queries, mean over them and all "
        "heads; a share of 1 is all of it. The top tokens are each layer's own."
    )
    columns = ["layer", *names, f"first {SINKS}", f"tokens for {MOST:.0%}"]
    return Finding(
        "Attention mass of the top tokens, by layer",
        about,
        [(name, "right") for name in columns],
        rows,
        panels,
    )


def _masses(one: Pass, index: int, window: int) -> list[float]:
    """Of one layer: mass of its top tokens by share, of the sinks, and how many hold most."""
    weights = window_weights(one.view(index), window).double().mean(dim=(0, 1))
    sums = weights.sort(descending=True).values.cumsum(0)
    count = len(weights)
    tops = [float(sums[ceil(share * count) - 1]) for share in SHARES]
    needed = int((sums < MOST * sums[-1]).sum()) + 1
    return [*tops, float(weights[:SINKS].sum()), needed / count]


def overlap(asked: Asked) -> Finding:
    """How many of one layer's important tokens are another's too."""
    rate, matrices = asked.rates[0], []
    layers: list[int] = []
    for one in passes(asked):
        layers = one.layers
        chosen = torch.stack([mask.double() for mask in chosen_tokens(one, rate)])
        matrices.append(chosen @ chosen.T / chosen.sum(dim=1).clamp(min=1)[:, None])
    matrix = torch.stack(matrices).mean(dim=0)
    count = len(layers)
    rows = []
    for at, layer in enumerate(layers):
        above = matrix[at, at + 1 :]
        following = float(above[0]) if count > at + 1 else None
        mean = float(above.mean()) if count > at + 1 else None
        rows.append([layer, following, mean, float(matrix[at].min())])
    panels = [
        {
            "kind": "map",
            "title": f"Overlap of the top {rate:.0%} tokens",
            "x": "layer",
            "y": "layer",
            "z": "shared tokens",
            "cells": matrix.tolist(),
            "xs": layers,
            "ys": layers,
            "low": 0.0,
            "high": 1.0,
        },
        {
            "kind": "lines",
            "title": "With the layers above",
            "x": "layer",
            "y": "overlap",
            "series": [
                {"label": "with the next", "x": layers[:-1], "y": [r[1] for r in rows[:-1]]},
                {
                    "label": "mean of all above",
                    "x": layers[:-1],
                    "y": [r[2] for r in rows[:-1]],
                },
            ],
            "limits": (0, 1.02),
        },
    ]
    about = (
        f"{asked.about}. The tokens are those that fastkv would send on from each layer at a "
        f"rate of {rate:.0%}, its window included; tokens drawn at random would overlap by "
        f"{rate:.2f}."
    )
    columns = ["layer", "next layer", "mean of layers above", "least"]
    return Finding(
        "Overlap of important tokens between layers",
        about,
        [(name, "right") for name in columns],
        rows,
        panels,
        more={"matrix": matrix.tolist(), "layers": layers},
    )


def chosen_tokens(one: Pass, rate: float) -> list[Tensor]:
    """Which tokens of a prompt each layer would send on: [n] of yes and no."""
    method, found = find(METHOD, tokens=rate), []
    for view in one.views:
        chosen = method.propagation.choose(view, method.policy, one.tokens)
        mask = torch.ones(one.tokens, dtype=torch.bool)
        if chosen is not None:
            mask = torch.zeros(one.tokens, dtype=torch.bool)
            mask[chosen[0].cpu()] = True
        found.append(mask)
    return found


def tsne(asked: Asked) -> Finding:
    """Final hidden states and logits when tokens are left behind at each layer."""
    try:
        from sklearn.manifold import TSNE
    except ModuleNotFoundError:
        raise UsageError(
            'this analysis needs scikit-learn: pip install "kvtrim[analysis]"'
        ) from None
    rate = asked.rates[0]
    count = len(empty_cache(asked.model).managed)
    layers = spread_layers(max(1, count - 1), count, asked.layers)
    if len(layers) < 2:
        raise UsageError("a map needs at least two layers; name more with --layer")
    full, parts = _prefills(asked, layers, rate)
    rows = []
    for at, layer in enumerate(layers):
        pairs = [(own[at], whole) for own, whole in zip(parts, full, strict=True)]
        away = [part.distance(whole) for part, whole in pairs]
        kl = median(part.kl(whole) for part, whole in pairs)
        same = fmean(int(a.logits.argmax()) == int(b.logits.argmax()) for a, b in pairs)
        rows.append([layer, median(away), min(away), max(away), kl, same])
    points = torch.stack([one.logits for own in parts for one in own] + [o.logits for o in full])
    perplexity = min(30.0, (len(points) - 1) / 3)
    placed = TSNE(
        perplexity=perplexity, init="pca", random_state=asked.seed, method="exact"
    ).fit_transform(points.float().numpy())
    narrow, whole = placed[: -len(full)], placed[-len(full) :]
    numbered = len(full) > 1
    shown = [str(at + 1) for at in range(len(full))] if numbered else ["full"]
    panels = [
        {
            "kind": "lines",
            "title": "Distance of the final hidden state from the full prefill's",
            "x": f"layer after which {rate:.0%} of the tokens go on",
            "y": "L2 distance / norm, median and range",
            "series": [
                {
                    "label": "",
                    "x": layers,
                    "y": [row[1] for row in rows],
                    "low": [row[2] for row in rows],
                    "high": [row[3] for row in rows],
                }
            ],
            "limits": (0, None),
        },
        {
            "kind": "points",
            "title": "t-SNE of the next token's logits" + (", by prompt" if numbered else ""),
            "x": "",
            "y": "",
            "bar": "layer after which the tokens go on",
            "series": [
                {
                    "label": "tokens left behind",
                    "x": narrow[:, 0].tolist(),
                    "y": narrow[:, 1].tolist(),
                    "colour": layers * len(full),
                    "size": 26,
                    "alpha": 0.9,
                },
                {
                    "label": "full prefill",
                    "x": whole[:, 0].tolist(),
                    "y": whole[:, 1].tolist(),
                    "names": shown,
                    "marker": "*",
                    "size": 120,
                    "alpha": 1.0,
                },
            ],
        },
    ]
    about = (
        f"{asked.about}. Above one layer only {rate:.0%} of the tokens are read on (fastkv, "
        "nothing else is evicted). Distance of the last token's final hidden state, relative to "
        "its norm; KL of the next token in nats, median over prompts; same: share of prompts "
        "whose likeliest next token stays."
    )
    columns = ["layer", "distance", "least", "most", "KL", "same token"]
    return Finding(
        "Hidden states and logits when tokens are left behind",
        about,
        [(name, "right") for name in columns],
        rows,
        panels,
        more={"tsne": placed.tolist(), "perplexity": perplexity},
    )


def _prefills(
    asked: Asked, layers: Sequence[int], rate: float
) -> tuple[list[Final], list[list[Final]]]:
    """What each prompt's full prefill ends with, and those with propagation after each layer."""
    full, parts = [], []
    steps = len(layers) + 1
    with attach(asked.model):
        for number, subject in enumerate(asked.subjects):
            ids = torch.tensor([subject.given.read_first(asked.aware)[0]])
            ids = ids.to(asked.model.device)
            full.append(full_prefill(asked.model, ids, rate)[0])
            own = []
            for at, layer in enumerate(layers):
                done = number * steps + at + 1
                what = f"{subject.name}, after layer {layer}"
                asked.report(what, done, len(asked.subjects) * steps)
                own.append(narrowed_prefill(asked.model, ids, layer, rate))
            parts.append(own)
    return full, parts


ANALYSES = (
    OfPrompts(
        "mass",
        "FastKV",
        "attention mass of the top tokens in each layer",
        "how much of a layer's attention its most attended tokens receive",
        uses=frozenset({"window"}),
        compute=mass,
    ),
    OfPrompts(
        "overlap",
        "FastKV",
        "overlap of important tokens between layers, as a matrix",
        "how many of the tokens that one layer would send on another would send on too",
        uses=frozenset({"rate"}),
        compute=overlap,
    ),
    OfPrompts(
        "tsne",
        "FastKV",
        "distance of final hidden states when tokens are dropped at a layer; t-SNE of logits",
        "how far the end of a prefill moves if most tokens are left behind after each layer",
        uses=frozenset({"rate", "layer", "seed"}),
        needs=("sklearn",),
        compute=tsne,
    ),
)
