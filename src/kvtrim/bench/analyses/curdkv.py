"""CurDKV's analyses: attention is not loss; what a choice by keys, values or both rebuilds.

Paper: https://arxiv.org/abs/2509.15038, sections 3 and 4.
Ours:  the loss of evicting one token is exact, in closed form: a query whose weight for it is a
       loses a / (1 - a) * |v - o|, o being its output, since the others' weights grow to sum to 1.
"""

from collections.abc import Sequence
from math import ceil
from statistics import fmean
from typing import Any

import torch

from kvtrim.bench.analyses.base import Asked, OfPrompts, spread_layers
from kvtrim.bench.analyses.passes import (
    Pass,
    blocks,
    evenly,
    kept_slots,
    mean_over,
    newest,
    passes,
    sample,
    spearman,
    values,
)
from kvtrim.bench.candidates import Candidate
from kvtrim.errors import UsageError
from kvtrim.methods.policies import curdkv
from kvtrim.methods.policies.ops import length_of
from kvtrim.report.findings import Finding
from kvtrim.types import Bool, Float, LayerView, Tensor

_SHOWN_LAYERS, _POINTS = 3, 1200
_LEAST = 1e-12  # that a query may leave to all other tokens


def loss(asked: Asked) -> Finding:
    """Each token's attention beside what evicting it alone would cost."""
    found: list[list[list[float]]] = []
    layers: list[int] = []
    shown: dict[int, tuple[Tensor, Tensor]] = {}
    for one in passes(asked):
        layers, own = one.layers, []
        wanted = spread_layers(len(layers), _SHOWN_LAYERS, asked.layers)
        for index, view in enumerate(one.views):
            attention, lost = eviction_losses(view, asked.window)
            own.append(_agreement(view, attention, lost))
            if index in wanted and index not in shown:
                some = sample(attention.numel(), _POINTS, asked.seed)
                shown[index] = attention.flatten()[some], lost.flatten()[some]
        found.append(own)
    rows = [
        [layer, *mean_over(own)]
        for layer, own in zip(layers, zip(*found, strict=True), strict=True)
    ]
    panels = [_scatter(layers[index], *pair) for index, pair in sorted(shown.items())]
    names = ["attention", "value norm", "leverage"]
    series = [
        {"label": name, "x": layers, "y": [row[1 + at] for row in rows]}
        for at, name in enumerate(names)
    ]
    panels.append(
        {
            "kind": "lines",
            "title": "Rank correlation with the eviction loss",
            "x": "layer",
            "y": "Spearman's coefficient",
            "series": series,
            "limits": (-1.02, 1.02),
            "level": 0.0,
        }
    )
    about = (
        f"{asked.about}. Loss: the change of the attention output of the last {asked.window} "
        "queries (Frobenius norm over the heads of a KV group) if one token before them is "
        "evicted. Rank correlations with it, means over KV heads, of the attention it receives, "
        "its value's norm and CurDKV's score; shared: how many of the tenth of the tokens with "
        "most attention are among the tenth with most loss."
    )
    columns = ["layer", *names, "shared top 10%"]
    return Finding(
        "Attention score against eviction loss",
        about,
        [(name, "right") for name in columns],
        rows,
        panels,
    )


def eviction_losses(
    view: LayerView, window: int
) -> tuple[Float[Tensor, "K N"], Float[Tensor, "K N"]]:
    """Mean attention of the last queries to each token before them, and the loss of evicting it.

    Raises:
        UsageError: no token stands before the window.
    """
    held = values(view).double()
    kv_heads, slots = held.shape[:2]
    count = slots - window
    if count < 2:
        raise UsageError(f"--window {window} leaves no tokens of {slots} to evict; use fewer")
    attention = held.new_zeros(kv_heads, count)
    squares = held.new_zeros(kv_heads, count)
    length = held.square().sum(dim=-1)[:, None, :count]  # [K, 1, N]
    for _, _, weights in blocks(view, newest(view, window)):
        own = weights.double().unflatten(0, (kv_heads, -1)).flatten(1, 2)  # [K, G r, n]
        out = own @ held  # [K, G r, E]
        kept = own[..., :count]
        attention += kept.sum(dim=1)
        share = kept / (1 - kept).clamp(min=_LEAST)
        across = out @ held[:, :count].transpose(-1, -2)
        apart = (length - 2 * across + out.square().sum(dim=-1, keepdim=True)).clamp(min=0)
        squares += (share.square() * apart).sum(dim=1)
    rows = window * (view.queries.shape[1] // kv_heads)
    return attention / rows, squares.sqrt()


def _agreement(
    view: LayerView, attention: Float[Tensor, "K N"], lost: Float[Tensor, "K N"]
) -> list[float]:
    """How attention, value norms and leverage go with the loss."""
    count = lost.shape[-1]
    norms = length_of(values(view)[:, :count])
    scores = curdkv.CurDKV().score(view)[0][:, :count]
    own = [spearman(x.to(lost), lost) for x in (attention, norms, scores)]
    tenth = max(1, ceil(count / 10))
    tops = [x.topk(tenth, dim=-1).indices for x in (attention, lost)]
    both = torch.stack([torch.isin(a, b).double().mean() for a, b in zip(*tops, strict=True)])
    return [float(x.mean()) for x in (*own, both)]


def _scatter(layer: int, attention: Tensor, lost: Tensor) -> dict[str, Any]:
    """The points of one layer; what is 0 has no place on these scales."""
    good = (attention > 0) & (lost > 0)
    rho = float(spearman(attention[None], lost[None])[0])
    dots = {"label": "", "x": attention[good].tolist(), "y": lost[good].tolist(), "size": 5}
    return {
        "kind": "points",
        "title": f"Layer {layer}: rank correlation {rho:.2f}",
        "x": "mean attention received",
        "y": "loss of evicting the token",
        "log_x": True,
        "log_y": True,
        "series": [dots],
    }


# What a choice of tokens rebuilds of Q K^T and softmax(Q K^T) V.

_QUERIES = 256  # of a prompt that are asked, evenly over it
CHOICES = {"key": "key", "value": "value", "kv": "key x value"}


def reconstruction(asked: Asked) -> Finding:
    """What is lost of logits and outputs when tokens are chosen by keys, values or both."""
    cells = [*_choices(asked.keeps), *((cell.label, cell) for cell in asked.cells)]
    sums: dict[tuple[str, str], list[list[float]]] = {}
    shares: dict[tuple[str, str], float] = {}
    layers: list[int] = []
    for one in passes(asked, hidden=True):
        layers = one.layers
        kept = {(name, cell.keep): kept_slots(one.cache(cell)) for name, cell in cells}
        for key, masks in kept.items():
            share = fmean(float(mask.double().mean()) for mask in masks)
            shares[key] = shares.get(key, 0.0) + share / len(asked.subjects)
        for index, view in enumerate(one.views):
            masks = {key: own[index] for key, own in kept.items()}
            for key, pair in reconstruction_losses(view, masks).items():
                sums.setdefault(key, []).append(list(pair))
    rows, means = [], {key: mean_over(own) for key, own in sums.items()}
    for keep in asked.keeps:
        rows += [
            [keep, name, shares[name, at], *means[name, at]] for name, at in means if at == keep
        ]
    names = list(dict.fromkeys(name for name, _ in means))
    panels = []
    for at, title in enumerate(("QK^T", "softmax(QK^T)V")):
        series = []
        for name in names:
            own = sorted((shares[key], means[key][at]) for key in means if key[0] == name)
            x, y = [100 * share for share, _ in own], [value for _, value in own]
            series.append({"label": name, "x": x, "y": y})
        panels.append(
            {
                "kind": "lines",
                "title": f"Reconstruction of {title}",
                "x": "tokens kept [%]",
                "y": "relative loss (Frobenius)",
                "series": series,
                "log_x": True,
                "limits": (0, None),
                "ticks": sorted({round(100 * share, 1) for share in shares.values()}),
            }
        )
    about = (
        f"{asked.about}. At most {_QUERIES} queries, evenly over the prompt, all heads; mean over "
        "layers, heads and prompts of the norm of what is missing over the norm of the whole. "
        "Logits of evicted tokens count as 0; outputs are those of a softmax over what is kept. "
        "Key, value and key x value: CurDKV with that leverage, its 4 sinks kept."
    )
    columns = [("keep", "right"), ("chosen by", "left"), ("kept", "right")]
    columns += [("loss of QK^T", "right"), ("loss of softmax(QK^T)V", "right")]
    title = "Reconstruction by key, value and combined selection"
    return Finding(title, about, columns, rows, panels, more={"layers": layers})


def _choices(keeps: Sequence[str]) -> list[tuple[str, Candidate]]:
    return [
        (name, Candidate("curdkv", keep, {"leverage": leverage}))
        for keep in keeps
        for leverage, name in CHOICES.items()
    ]


def reconstruction_losses(
    view: LayerView, kept: dict[Any, Bool[Tensor, "X n"]]
) -> dict[Any, tuple[float, float]]:
    """Relative losses of logits and of outputs under each choice, mean over the query heads."""
    held = values(view)
    heads, kv_heads = view.queries.shape[1], held.shape[0]
    wide = {
        key: mask.repeat_interleave(heads // mask.shape[0], dim=0)[:, None].to(held.device)
        for key, mask in kept.items()
    }
    columns = held.new_zeros(heads, held.shape[1], dtype=torch.float64)
    missing = {key: held.new_zeros(heads, dtype=torch.float64) for key in kept}
    whole = held.new_zeros(heads, dtype=torch.float64)
    for rows, logits, weights in blocks(view, evenly(view, _QUERIES)):
        seen = torch.arange(logits.shape[-1], device=held.device) <= rows[:, None]
        columns += logits.masked_fill(~seen, 0).square().sum(dim=1)
        out = _mix(weights, held, kv_heads)
        whole += out.double().square().sum(dim=(1, 2))
        for key, mask in wide.items():
            left = weights * mask
            again = _mix(left, held, kv_heads) / left.sum(dim=-1, keepdim=True).clamp(min=1e-30)
            missing[key] += (out - again).double().square().sum(dim=(1, 2))
    total, found = columns.sum(dim=-1), {}
    for key, mask in wide.items():
        logits_lost = (columns.masked_fill(mask[:, 0], 0).sum(dim=-1) / total).sqrt()
        outputs_lost = (missing[key] / whole).sqrt()
        found[key] = float(logits_lost.mean()), float(outputs_lost.mean())
    return found


def _mix(
    weights: Float[Tensor, "H r n"], held: Float[Tensor, "K n E"], kv_heads: int
) -> Float[Tensor, "H r E"]:
    grouped = weights.unflatten(0, (kv_heads, -1)).flatten(1, 2)
    return (grouped @ held).view(*weights.shape[:2], held.shape[-1])


# Leverage: how unevenly tokens span the space of keys and of values.

_SPECTRA, _ENERGY, _TOP = 5, 0.9, 0.1


def leverage(asked: Asked) -> Finding:
    """How leverage is spread over tokens, and how many directions keys and values have."""
    found: list[list[list[float]]] = []
    layers: list[int] = []
    spectra: dict[int, dict[str, Tensor]] = {}
    for one in passes(asked):
        layers, own = one.layers, []
        wanted = spread_layers(len(layers), _SPECTRA, asked.layers)
        for index in range(len(layers)):
            sides = _sides(one, index)
            own.append([*_ranks(one, index), *(_top(scores) for scores in sides.values())])
            if index in wanted and index not in spectra:
                spectra[index] = sides
        found.append(own)
    rows = [
        [layer, *mean_over(own)]
        for layer, own in zip(layers, zip(*found, strict=True), strict=True)
    ]
    panels = []
    for side in ("keys", "values", "keys x values"):
        series = []
        for index, sides in sorted(spectra.items()):
            x, y = _curve(sides[side])
            series.append({"label": f"layer {layers[index]}", "x": x, "y": y})
        panels.append(
            {
                "kind": "lines",
                "title": f"Leverage of {side}",
                "x": "tokens, most leverage first [%]",
                "y": "share of a head's leverage",
                "series": series,
                "ordered": True,
                "log_x": True,
                "log_y": True,
            }
        )
    ranks = [
        {"label": name, "x": layers, "y": [row[1 + at] for row in rows]}
        for at, name in enumerate(("keys", "values"))
    ]
    panels.append(
        {
            "kind": "lines",
            "title": f"Directions with {_ENERGY:.0%} of the energy",
            "x": "layer",
            "y": "singular values",
            "series": ranks,
            "limits": (0, None),
        }
    )
    about = (
        f"{asked.about}. Leverage: squared row norms of the left singular vectors of a head's "
        "keys or values, as a share of their sum; means over KV heads. Rank: how many singular "
        f"values hold {_ENERGY:.0%} of the squared norm. Top: the share of the leverage that the "
        f"{_TOP:.0%} of tokens with most of it have (evenly spread: {_TOP:.2f})."
    )
    columns = ["layer", "rank of keys", "rank of values"]
    columns += [f"top {_TOP:.0%} of {name}" for name in ("keys", "values", "product")]
    title = "Leverage spectra of keys and values"
    return Finding(title, about, [(name, "right") for name in columns], rows, panels)


def _sides(one: Pass, index: int) -> dict[str, Float[Tensor, "K n"]]:
    """Shares of leverage of each head's tokens, by what they come from."""
    view = one.view(index)
    keys, held = (curdkv.leverages(rows)[0] for rows in (view.keys, view.values))
    sides = {"keys": keys, "values": held, "keys x values": keys * held}
    return {name: own / own.sum(dim=-1, keepdim=True) for name, own in sides.items()}


def _ranks(one: Pass, index: int) -> list[float]:
    """How many directions of keys and of values hold most of the energy, mean over heads."""
    found, view = [], one.view(index)
    for rows in (view.keys[0], view.values[0]):
        energy = torch.linalg.svdvals(rows.double()).square()
        sums = energy.cumsum(dim=-1) / energy.sum(dim=-1, keepdim=True)
        found.append(float(((sums < _ENERGY).sum(dim=-1) + 1).double().mean()))
    return found


def _top(scores: Float[Tensor, "K n"]) -> float:
    count = ceil(_TOP * scores.shape[-1])
    return float(scores.topk(count, dim=-1).values.sum(dim=-1).mean())


def _curve(scores: Float[Tensor, "K n"]) -> tuple[list[float], list[float]]:
    """Sorted shares, mean over heads, at places that a logarithmic axis can tell apart."""
    means = scores.double().sort(dim=-1, descending=True).values.mean(dim=0)
    count = len(means)
    places = torch.logspace(0, torch.tensor(float(count)).log10().item(), 60).round().long()
    places = places.unique().clamp(max=count)
    return (100 * places / count).tolist(), means[places - 1].tolist()


ANALYSES = (
    OfPrompts(
        "loss",
        "CurDKV",
        "attention score against eviction loss",
        "whether tokens with much attention are those whose eviction costs much",
        uses=frozenset({"window", "layer", "seed"}),
        compute=loss,
    ),
    OfPrompts(
        "reconstruction",
        "CurDKV",
        "reconstruction loss of QK^T and softmax(QK^T)V for key, value and combined selection",
        "what is missing of logits and outputs when tokens are chosen by keys, values or both",
        uses=frozenset({"methods", "keeps"}),
        keeps=("50%", "25%", "12.5%", "6.25%", "3.125%"),
        compute=reconstruction,
    ),
    OfPrompts(
        "leverage",
        "CurDKV",
        "leverage spectra",
        "how unevenly tokens span the space of keys, of values and of both",
        uses=frozenset({"layer"}),
        compute=leverage,
    ),
)
