"""FastKV's trade: right answers and first tokens by propagation layer, length and rate.

Paper: Jo et al. 2025, https://arxiv.org/abs/2502.01068, section 4.
Ours:  nothing is evicted besides, so that answers and seconds are those of propagation alone.
"""

from collections.abc import Sequence
from statistics import fmean, median
from time import perf_counter
from typing import Any

import torch

from kvtrim.bench.analyses.base import Asked, OfPrompts, Subject, spread_layers
from kvtrim.bench.calibrate.tsp import empty_cache
from kvtrim.bench.eval.decode import Reference, answers, fits, make_branch
from kvtrim.hf.attach import attach
from kvtrim.hf.base import BaseCache, cache_keyword
from kvtrim.hf.cache import Cache
from kvtrim.hf.generate import synchronize
from kvtrim.report.findings import Finding
from kvtrim.types import Int, Tensor

_SOME_LAYERS = 5
_MARKED = 16  # layers that an axis can name


def propagation(asked: Asked) -> Finding:
    """Right answers and first tokens with propagation after some layers, at some rates."""
    count = len(empty_cache(asked.model).managed)
    layers = spread_layers(max(1, count - 1), _SOME_LAYERS, asked.layers)
    wanted: list[tuple[int | None, float | None]] = [(None, None)]
    wanted += [(layer, rate) for rate in asked.rates for layer in layers]
    runs: dict[tuple[int, int | None, float | None], list[tuple[float, float | None, float]]] = {}
    with attach(asked.model):
        _answer(asked, asked.subjects[0], None, None)  # warms up
        for number, subject in enumerate(asked.subjects):
            length = int(subject.given.sample.group.get("length", 0)) or subject.tokens
            for at, (layer, rate) in enumerate(wanted):
                what = f"{subject.name}, {_name_of(layer, rate)}"
                asked.report(what, number * len(wanted) + at, len(asked.subjects) * len(wanted))
                run = _answer(asked, subject, layer, rate)
                runs.setdefault((length, layer, rate), []).append(run)
    rows = []
    for (length, layer, rate), own in sorted(runs.items(), key=lambda one: _order(one[0])):
        score = fmean(run[0] for run in own)
        losses = [run[1] for run in own if run[1] is not None]
        seconds = median(run[2] for run in own)
        base = median(run[2] for run in runs[length, None, None])
        shown = "full" if rate is None else f"{rate:.0%}"
        loss = fmean(losses) if losses else None
        rows.append([length, shown, layer, len(own), score, loss, seconds, seconds / base])
    lengths = list(dict.fromkeys(row[0] for row in rows))
    columns = ["length", "rate", "layer", "prompts", "score", "loss", "TTFT [s]", "to full"]
    about = (
        f"{asked.about}. Above the layer only the share of tokens called rate is read on; nothing "
        "is evicted otherwise. Score 0 to 1; loss: nats per token of the right answer; time to "
        "first token: median over prompts, one reading each."
    )
    return Finding(
        "Accuracy and time to first token by propagation layer, length and rate",
        about,
        [(name, "right") for name in columns],
        rows,
        [panel for length in lengths for panel in _panels(rows, length, len(lengths) > 1)],
        across=len(_PANELS),
    )


_PANELS = (
    (4, "score", "Score", (-0.02, 1.02)),
    (5, "nats per token", "Loss of the right answer", None),
    (7, "relative to the full prefill", "Time to first token", (0, None)),
)


def _panels(rows: Sequence[Sequence[Any]], length: int, several: bool) -> list[dict[str, Any]]:
    """The figures of one length over layers: a line for each rate, the full prefill in black."""
    mine = [row for row in rows if row[0] == length]
    layers = sorted({row[2] for row in mine if row[2] is not None})
    made = []
    for at, unit, title, limits in _PANELS:
        series = []
        for rate in dict.fromkeys(row[1] for row in mine):
            own = [(row[2], row[at]) for row in mine if row[1] == rate and row[at] is not None]
            if rate == "full":
                own = [(layer, value) for _, value in own for layer in (layers[0], layers[-1])]
            if own:
                label = rate if rate == "full" else f"rate {rate}"
                x, y = zip(*own, strict=True)
                series.append({"label": label, "x": [*x], "y": [*y]})
        named = f"{title}, prompts of {length:,} tokens" if several else title
        panel = {"kind": "lines", "title": named, "x": "propagation layer", "y": unit}
        panel |= {"series": series} | ({"ticks": layers} if len(layers) <= _MARKED else {})
        made.append(panel | ({"limits": limits} if limits is not None else {}))
    return made


def _name_of(layer: int | None, rate: float | None) -> str:
    return "full" if rate is None else f"{rate:.0%} after layer {layer}"


def _order(key: tuple[int, int | None, float | None]) -> tuple[int, float, int]:
    length, layer, rate = key
    return length, -1.0 if rate is None else rate, layer or 0


def _answer(
    asked: Asked, subject: Subject, layer: int | None, rate: float | None
) -> tuple[float, float | None, float]:
    """Score, loss of the right answer, seconds to the first token."""
    task, given, model = subject.task, subject.given, asked.model
    ids, _, lead = given.read_first(asked.aware)
    cache: BaseCache = Cache(model, "full")
    if layer is not None:
        cache = empty_cache(model, layer=layer, tokens=rate)
    start = _now(model)
    logits = _read(model, torch.tensor([ids], device=model.device), cache)
    int(logits.argmax())
    seconds = _now(model) - start
    branch = make_branch(model, [cache], [logits], lead, len(given.ids))
    gold = given.gold
    loss = None
    if len(gold) > asked.aware:
        loss = fits(model, branch, gold, 1 if asked.aware else 0, Reference())[0].loss
    stop = [text for text in task.stop if text]
    most = task.max_new_tokens
    said = answers(model, asked.tokenizer, branch, most, stop, task.min_new_tokens)[0].text
    return float(task.score(said, given.sample)), loss, seconds


def _read(model: Any, ids: Int[Tensor, "1 n"], cache: BaseCache) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **cache_keyword(cache), logits_to_keep=1).logits[0, -1]


def _now(model: Any) -> float:
    synchronize(model.device)
    return perf_counter()


ANALYSES = (
    OfPrompts(
        "propagation",
        "FastKV",
        "accuracy and time to first token by propagation layer, length and rate",
        "what propagation after some layers costs in answers and saves in seconds",
        uses=frozenset({"rate", "layer", "lengths"}),
        scores=True,
        compute=propagation,
    ),
)
