"""The propagation layer: after which layer of a model most tokens may be left behind.

FastKV lets every layer up to one read the whole prompt and the layers above it only the T best
tokens. For each layer l that could be that one, over a few prompts:

    mass      share of the attention that the last `window` queries pay, in all heads, that falls
              on the T tokens chosen at l: at l itself, and (`later`) its mean over the layers
              above
    overlap   |chosen(l) & chosen(m)| / T, mean over the layers m above
    distance  |h_l - h| / |h|: h is the last token's final hidden state, h_l the same with
              propagation after l. Nothing is evicted otherwise
    kl        of the next token's distribution, in nats: full prefill against propagation after l

Mass and overlap are means over the prompts and come from one full prefill of each; distance and
kl are medians and need one more prefill for each layer.

The rule: the earliest layer whose distance is no larger than the middle layer's, or than a
tolerance. The minimum of the curve, which is the rule attributed to FastKV's later versions, lies
near the last layer, where hardly any prefill is saved.

Paper: Jo et al. 2025 (FastKV), https://arxiv.org/abs/2502.01068, section 4.
Ours:  the distance is relative; attention mass is that of the tokens that really go on.
"""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from kvtrim import files
from kvtrim.bench.calibrate.needles import plant
from kvtrim.bench.provenance import provenance
from kvtrim.engine.layer import Call
from kvtrim.errors import UsageError
from kvtrim.hf.attach import attach
from kvtrim.hf.base import cache_keyword
from kvtrim.hf.cache import Cache
from kvtrim.hf.models import fingerprint
from kvtrim.hf.models.architectures import layout, window
from kvtrim.methods.keep import Keep
from kvtrim.methods.policies import ops
from kvtrim.methods.propagation import TokenSelective
from kvtrim.methods.propagation import layers as at
from kvtrim.methods.settings import find
from kvtrim.prompts import encode_text, frame
from kvtrim.tasks import haystack
from kvtrim.types import Float, Int, LayerView, Tensor

Report = Callable[[str, int, int], None]
_GOLDEN = 0.6180339887  # multiples of it, modulo 1, are spread evenly however many there are


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    tokens: int | float = 0.2  # how many go on: a number, or a share of the prompt
    prompts: int = 8
    length: int = 2000
    seed: int = 0
    tolerance: float | None = None  # a distance that is small enough; none: the middle layer's
    chat: bool | None = None


@dataclass(frozen=True)
class Point:
    """What choosing at one layer does."""

    layer: int
    mass: float
    later: float
    overlap: float
    distance: float
    kl: float
    distances: list[float]  # of each prompt


@dataclass(frozen=True)
class Choice:
    """The layer that a rule finds on a curve."""

    layer: int
    limit: float  # the distance that was small enough
    rule: str


def amount_of(text: str) -> int | float:
    """A number of tokens, or a share of the prompt, from text.

    Raises:
        UsageError: neither of them.
    """
    propagation = find(METHOD, tokens=text).propagation
    assert isinstance(propagation, TokenSelective)
    return propagation.tokens


def prompts(
    model: Any, tokenizer: Any, plan: Plan, texts: Sequence[str] | None = None
) -> list[list[int]]:
    """Token ids to measure with: the texts as user messages, or needle prompts from the seed.

    Raises:
        UsageError: a prompt longer than the model's window, or so short that all of it goes on.
    """
    if texts is None:
        made = [_generate(tokenizer, plan, number) for number in range(plan.prompts)]
    else:
        around = frame(tokenizer, plan.chat)
        made = [encode_text(tokenizer, around.before + text + around.after) for text in texts]
    most = window(model)
    for number, ids in enumerate(made, start=1):
        if len(ids) > most:
            raise UsageError(f"prompt {number} has {len(ids)} tokens, the window {most}")
        if len(ids) <= at.amount(plan.tokens, len(ids)):
            raise UsageError(
                f"tokens={plan.tokens}: all {len(ids)} tokens of prompt {number} go on, so there "
                "is nothing to measure; use fewer tokens or longer prompts"
            )
    return made


def _generate(tokenizer: Any, plan: Plan, number: int) -> list[int]:
    draw, depth = random.Random(f"{plan.seed}-{number}"), (0.5 + number * _GOLDEN) % 1
    riddle = haystack.riddle("contrast", draw)
    return plant(tokenizer, riddle, haystack.filler(draw), plan.length, depth, plan.chat).ids


def measure(
    model: Any,
    prompts: Sequence[list[int]],
    tokens: int | float = 0.2,
    report: Report = lambda *_: None,
) -> list[Point]:
    """The curve over all layers but the last, above which nothing is left to narrow.

    Args:
        report: told what goes on, how many prefills are done, and out of how many.

    Raises:
        UsageError: a model of one layer.
        UnsupportedModelError: layers that slide.
    """
    layers = len(empty_cache(model).managed)
    if layers < 2:
        raise UsageError("a model of one layer has none that could read a part of the prompt")
    samples: list[list[tuple[float, ...]]] = [[] for _ in range(layers - 1)]
    with attach(model):
        for number, given in enumerate(prompts):
            ids, done = torch.tensor([given], device=model.device), number * layers
            report(f"prompt {number + 1}, all layers", done, len(prompts) * layers)
            full, looked = full_prefill(model, ids, tokens)
            for layer, own in enumerate(samples):
                what = f"prompt {number + 1}, propagation after layer {layer}"
                report(what, done + layer + 1, len(prompts) * layers)
                part, above = narrowed_prefill(model, ids, layer, tokens), range(layer + 1, layers)
                own.append(
                    (
                        looked.mass(layer, layer),
                        fmean(looked.mass(layer, other) for other in above),
                        fmean(looked.overlap(layer, other) for other in above),
                        part.distance(full),
                        part.kl(full),
                    )
                )
    return [_point(layer, *zip(*own, strict=True)) for layer, own in enumerate(samples)]


def _point(layer: int, *columns: tuple[float, ...]) -> Point:
    mass, later, overlap, distance, kl = columns
    means = (round(fmean(each), 4) for each in (mass, later, overlap))
    medians = (_short(median(each)) for each in (distance, kl))
    return Point(layer, *means, *medians, distances=[_short(each) for each in distance])


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def choose(curve: Sequence[Point], tolerance: float | None = None) -> Choice:
    """The earliest layer that is close enough to the full prefill.

    Close enough is the middle layer's distance by default: then the layer is never later than the
    published rule of thumb, and by this measure never worse.
    """
    if tolerance is None:
        middle = curve[at.middle(None, len(curve) + 1)]
        limit, reached = middle.distance, f"the middle layer's ({middle.layer})"
    else:
        limit, reached = tolerance, "the tolerance"
    for point in curve:
        if point.distance <= limit:
            rule = f"the earliest layer whose median distance is no larger than {reached}"
            return Choice(point.layer, limit, rule)
    nearest = min(curve, key=lambda point: point.distance)
    return Choice(nearest.layer, limit, "the smallest median distance; none is within tolerance")


def table(
    model: Any,
    tokenizer: Any,
    name: str,
    plan: Plan,
    ids: Sequence[list[int]],
    curve: Sequence[Point],
    texts: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The layer found and everything about how, ready for JSON."""
    choice = choose(curve, plan.tolerance)
    digest = hashlib.sha256("\n".join(texts or []).encode()).hexdigest()
    record = asdict(plan) | {"prompts": len(ids), "lengths": [len(own) for own in ids]}
    record["texts"] = "generated" if texts is None else f"sha256 {digest}"
    record |= {"method": METHOD, "fingerprint": fingerprint.of_model(model)}
    record |= {
        "tokenizer": fingerprint.of_tokenizer(tokenizer),
        "machine": provenance(model.device),
    }
    return {
        "layer": choice.layer,
        "rule": choice.rule,
        "limit": choice.limit,
        "identity": fingerprint.identity(model),
        "model": name,
        "layers": len(curve) + 1,
        "tokens": plan.tokens,
        "curve": [asdict(point) for point in curve],
        "record": record,
    }


def write(path: Path, found: dict[str, Any]) -> None:
    """Write a table; an older file is replaced only by a complete one.

    Raises:
        FileError: the folder cannot be written to, or the disk is full.
    """
    files.replace(path, (json.dumps(found, indent=1) + "\n").encode())


# Prefills to compare: by all layers, and above one layer by the tokens chosen there alone.

METHOD = "fastkv"
_LEAST = Keep("share", 1e-6)  # every prompt is longer, so its tokens are always chosen


@dataclass(frozen=True)
class Looked:
    """What the layers of a full prefill look at."""

    chosen: list[Int[Tensor, " T"]]  # the tokens each layer would send on
    weights: list[Float[Tensor, " n"]]  # its window's attention, mean over queries and heads

    def mass(self, layer: int, seen_from: int) -> float:
        """The share of one layer's attention that falls on what another chose."""
        return float(self.weights[seen_from][self.chosen[layer]].sum())

    def overlap(self, layer: int, other: int) -> float:
        """The share of one layer's choice that another makes too."""
        both = torch.isin(self.chosen[layer], self.chosen[other])
        return float(both.double().mean())


@dataclass(frozen=True)
class Final:
    """What a prefill ends with, at the last token."""

    hidden: Float[Tensor, " M"]
    logits: Float[Tensor, " V"]

    def distance(self, full: "Final") -> float:
        """How far the hidden state is from the full prefill's, relative to its norm."""
        return float((self.hidden - full.hidden).norm() / full.hidden.norm())

    def kl(self, full: "Final") -> float:
        """Kullback-Leibler divergence of the next token, in nats, from the full prefill's."""
        wanted, got = full.logits.log_softmax(-1), self.logits.log_softmax(-1)
        return max(0.0, float((wanted.exp() * (wanted - got)).sum()))


def full_prefill(
    model: Any, ids: Int[Tensor, "1 n"], tokens: int | float = 0.2
) -> tuple[Final, Looked]:
    """Read a prompt with every layer, and see what each of them would send on.

    The model must be attached.
    """
    method, looked, managed = (
        find(METHOD, tokens=tokens),
        Looked([], []),
        layout(model, True).managed,
    )
    policy, slots = method.policy, ids.shape[1]

    def look(index: int, call: Call) -> None:
        view = LayerView(
            index=index,
            layers=len(managed),
            keep=slots,
            tokens=slots,
            queries=call.queries[:, :, -policy.lookback() :],
            keys=call.keys,
            values=call.values,
            positions=torch.arange(slots).expand(*call.keys.shape[:2], -1),
            scale=call.scale,
            softcap=call.softcap,
        )
        chosen = method.propagation.choose(view, policy, slots)
        looked.chosen.append(torch.arange(slots) if chosen is None else chosen[0].cpu())
        looked.weights.append(ops.attention(view).double().mean(dim=(0, 1, 2)).cpu())

    return _final(model, ids, Cache(model, "full", tap=look)), looked


def narrowed_prefill(
    model: Any, ids: Int[Tensor, "1 n"], layer: int, tokens: int | float = 0.2
) -> Final:
    """Read a prompt with propagation after a layer and no other loss; the model is attached."""
    return _final(model, ids, empty_cache(model, layer=layer, tokens=tokens))


def empty_cache(model: Any, **settings: Any) -> Cache:
    """A cache for narrowed prefills that evicts nothing.

    Raises:
        UnsupportedModelError: some of the model's layers slide.
    """
    return Cache(model, METHOD, _LEAST, budget="unlimited", **settings)


def _final(model: Any, ids: Int[Tensor, "1 n"], cache: Cache) -> Final:
    states: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        states.append(output.last_hidden_state[0, -1].double().cpu())

    hook = model.get_decoder().register_forward_hook(keep)
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, **cache_keyword(cache), logits_to_keep=1).logits
    finally:
        hook.remove()
    return Final(states[0], logits[0, -1].double().cpu())
