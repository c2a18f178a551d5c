"""Fitting echo: ridge regression of the log of a probe's scores on hidden states, in closed form.

Each text is read once and probed as `kvzip`, `kvzip-plus` or `kvgrad` does. Per layer only
weighted sums over its tokens are kept (x x', x y, y y of what the maps read and of log scores y),
so memory does not depend on how much text is read. A token counts by the root of its score, as a
mean over heads: what a cut drops at any budget need not be told apart. The second maps read what
the first one says, which is linear in the same sums. Every sixth text is held out, chooses the
ridge and gives R^2 per layer and head. Texts are of several lengths, so that what comes with the
end of a text is told from what comes with its length.

Paper: KVzap, https://arxiv.org/abs/2601.07891 (gradient descent on the logs of KVzip+'s scores).
Ours:  closed form over sums; the held-out texts choose the ridge; what a chat template puts before
       a text counts, too, with KVzip's score for it, which is 0; KVgrad's scores as a target.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from kvtrim.bench.provenance import provenance
from kvtrim.errors import UnsupportedModelError, UsageError
from kvtrim.hf.attach import attach
from kvtrim.hf.models import fingerprint
from kvtrim.hf.replay import Recording, record
from kvtrim.hf.rotary import rotations
from kvtrim.methods.budgets import Global
from kvtrim.methods.echo_tables import EchoTable, Linear
from kvtrim.methods.method import Method
from kvtrim.methods.policies.base import Policy
from kvtrim.methods.policies.echo import ENDS, Echo, lengths, seen_at_the_end
from kvtrim.methods.policies.kvgrad import KVgrad
from kvtrim.methods.policies.kvzip import KVzip
from kvtrim.prompts import encode_context, frame, repeat_words
from kvtrim.types import Float, LayerView, Scores, Tensor

Target = Literal["kvzip", "kvzip-plus", "kvgrad"]
Report = Callable[[str, int, int], None]

# Shares of the mean variance, to choose from: little for much text, much for little text.
RIDGES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
SECOND = 1e-4  # the ridge of the second maps, which read few numbers
LEAST = 1e-3  # added to a score before its log: entries below it go at any budget
WEIGHT = 0.5  # the power of a score that a token counts by
FEW = 0.03  # of a text's entries score above one half, if what they score is no attention
PARTS = (1, 1, 0.5, 1, 0.25)  # of the longest length, text by text
SHORTEST = 64  # tokens of a text
HOLD_OUT = 6  # every sixth text is not fitted on


@dataclass(frozen=True)
class Plan:
    """What is fitted on how much text."""

    target: Target = "kvzip"
    tokens: int = 20_000  # in all, texts held out included
    length: int = 1200  # of one text at most
    seed: int = 0  # of the texts that are made
    chat: bool | None = None


@dataclass
class Sums:
    """Weighted sums over tokens of one layer: all that the regressions need."""

    xx: Float[Tensor, "F1 F1"]  # the last row and column belong to the constant 1
    xy: Float[Tensor, "F1 K"]
    yy: Float[Tensor, " K"]

    @classmethod
    def empty(cls, width: int, heads: int) -> "Sums":
        """No token yet."""
        zeros = (width + 1, width + 1), (width + 1, heads), (heads,)
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in zeros))

    def add(
        self,
        x: Float[Tensor, "n F"],
        y: Float[Tensor, "n K"],
        weight: Float[Tensor, " n"] | None = None,
    ) -> None:
        """Tokens: what is read of each, its log scores, and how much it counts (None: 1)."""
        x, y = x.double().cpu(), y.double().cpu()
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        weighed = x if weight is None else x * weight.double().cpu()[:, None]
        self.xx += weighed.T @ x
        self.xy += weighed.T @ y
        self.yy += weighed[:, -1] @ (y * y)

    @property
    def count(self) -> float:
        """What the tokens so far count together."""
        return float(self.xx[-1, -1])

    def seen_by(self, view: Float[Tensor, "F1 G1"]) -> "Sums":
        """The sums that one would have of `[x, 1] @ view`, whose last column is the constant."""
        return Sums(view.T @ self.xx @ view, view.T @ self.xy, self.yy)

    def solve(self, ridge: float) -> Float[Tensor, "F1 K"]:
        """Weights and, in the last row, bias of the ridge regression on standardised numbers."""
        mean, target = self.xx[-1, :-1] / self.count, self.xy[-1] / self.count
        spread = self.xx[:-1, :-1] / self.count - mean[:, None] * mean
        size = spread.diagonal().clamp(min=1e-12).sqrt()
        spread = spread / (size[:, None] * size)
        both = (self.xy[:-1] / self.count - mean[:, None] * target) / size[:, None]
        spread.diagonal().add_(ridge)
        weight = torch.linalg.solve(spread, both) / size[:, None]
        return torch.cat([weight, (target - mean @ weight)[None]])

    def r2(self, weight: Float[Tensor, "F1 K"]) -> Float[Tensor, " K"]:
        """R^2 of given weights on these tokens, per head."""
        error = (weight * (self.xx @ weight)).sum(dim=0) - 2 * (weight * self.xy).sum(dim=0)
        mean = self.xy[-1] / self.count
        return 1 - (error + self.yy) / (self.yy - self.count * mean * mean).clamp(min=1e-12)


@dataclass(frozen=True)
class Fitted:
    """A table, and how well it foretells texts that it was not fitted on."""

    table: EchoTable
    explained: Float[Tensor, "L K"]  # R^2 on the held-out texts, of the first map
    second: dict[str, Float[Tensor, "L K"]]  # and of the second ones
    ridge: float
    tried: dict[float, float]  # mean R^2 by ridge
    texts: list[dict[str, Any]]


@dataclass(frozen=True)
class _Noting(Policy):
    """A policy, noting what its probe found."""

    notes: dict[int, Tensor] = field(default_factory=dict, compare=False, kw_only=True)

    def score(self, layer: LayerView) -> Scores:
        scores = super().score(layer)
        self.notes[layer.index] = scores.clone()  # the store is cut in place
        return scores


@dataclass(frozen=True)
class _NotingKVzip(_Noting, KVzip):
    """KVzip or KVzip+, likewise."""


@dataclass(frozen=True)
class _NotingKVgrad(_Noting, KVgrad):
    """KVgrad, likewise."""


@dataclass(frozen=True)
class _Reading(Echo):
    """Echo, noting what its maps read: F numbers of each token."""

    notes: dict[int, Tensor] = field(default_factory=dict, compare=False)

    def fitted(self, target: Any) -> "_Reading":
        return self

    def foresee(
        self,
        index: int,
        hidden: Float[Tensor, "B Q M"],
        keys: Float[Tensor, "B K Q D"],
        values: Float[Tensor, "B K Q E"],
    ) -> Float[Tensor, "B N Q"]:
        heads = keys.shape[1]
        self.notes[index] = torch.cat([hidden.float(), lengths(keys, values, heads)], dim=-1)
        return torch.ones_like(keys[..., 0], dtype=torch.float32)

    def score(self, layer: LayerView) -> Scores:
        heads = layer.keys.shape[1]
        rest = seen_at_the_end(layer, heads)[0][..., heads:]  # but for what the first map says
        self.notes[layer.index] = torch.cat([self.notes[layer.index], rest], dim=-1)
        return super().score(layer)


def fit(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    texts: Mapping[str, str],
    report: Report = lambda *_: None,
) -> Fitted:
    """Fit a table.

    Args:
        texts: by name; read in this order until `plan.tokens` are reached, each cut to
            `plan.length`.
        report: told what goes on, how many tokens are done, and out of how many.

    Raises:
        UsageError: fewer than two texts of at least `SHORTEST` tokens, so that none can be held
            out.
    """
    around = frame(tokenizer, plan.chat)
    words = repeat_words(tokenizer, around)
    sums: dict[bool, list[Sums]] = {}
    noted: list[dict[str, Any]] = []
    done, total = 0, plan.tokens
    with torch.no_grad(), attach(model):
        for name, text in texts.items():
            if done >= total:
                break
            ids = encode_context(tokenizer, around, text).context
            part = int(plan.length * PARTS[len(noted) % len(PARTS)])
            ids = ids[: len(words.prefix) + min(max(SHORTEST, part), total - done)]
            own = len(ids) - len(words.prefix)
            if own < SHORTEST:
                continue
            report(name, done, total)
            held_out = len(noted) % HOLD_OUT == HOLD_OUT - 1 or len(noted) == 1
            recording = record(model, torch.tensor([ids], device=model.device), None, words)
            _add(sums.setdefault(held_out, []), recording, plan)
            digest = hashlib.sha256(text.encode()).hexdigest()
            noted.append({"name": name, "tokens": own, "held_out": held_out, "sha256": digest})
            done += own
    if len(sums) < 2:
        raise UsageError(
            "echo is fitted on some texts and judged on others: give at least two of "
            f"{SHORTEST} tokens"
        )
    return _solve(sums[False], sums[True], noted, model.config.get_text_config().hidden_size)


def _take_notes(target: Target) -> _NotingKVzip | _NotingKVgrad:
    return _NotingKVgrad() if target == "kvgrad" else _NotingKVzip(plus=target == "kvzip-plus")


def scores_of(recording: Recording, target: Target) -> list[Float[Tensor, "K n"]]:
    """What a probe says of every entry of each layer.

    KVzip's scores are attention, 0 to 1. Those of others have a model's own size, and are divided
    by what makes them as large as KVzip's are on most texts.
    """
    policy = _take_notes(target)
    recording.cache(Method(policy, budget=Global()), policy.sinks + 1)
    scores = [policy.notes[layer][0] for layer in sorted(policy.notes)]
    if not policy.weighs_values:
        return scores
    every = torch.cat([own[:, policy.sinks :].flatten() for own in scores])
    high = every.kthvalue(max(1, round((1 - FEW) * len(every)))).values
    return [own / (2 * high) for own in scores]


def read_by_echo(recording: Recording) -> list[Float[Tensor, "n F"]]:
    """What echo's maps read of every token of each layer."""
    policy = _Reading(asked=Echo.asked if _turns(recording.model) else 0)
    recording.cache(Method(policy, budget=Global()), policy.sinks + 1)
    return [policy.notes[layer][0] for layer in sorted(policy.notes)]


def _turns(model: Any) -> bool:
    """Whether the model's queries can be turned."""
    try:
        rotations(model)
    except UnsupportedModelError:
        return False
    return True


def _add(sums: list[Sums], recording: Recording, plan: Plan) -> None:
    """One text's tokens, but for the sinks, which always stay."""
    found = zip(read_by_echo(recording), scores_of(recording, plan.target), strict=True)
    for layer, (x, scores) in enumerate(found):
        x, y = x[Echo.sinks :], (scores[:, Echo.sinks :] + LEAST).T
        if layer == len(sums):
            sums.append(Sums.empty(x.shape[1], y.shape[1]))
        sums[layer].add(x, y.log(), (y**WEIGHT).mean(dim=1))


@dataclass(frozen=True)
class _Layout:
    """Where the F numbers that echo's maps read stand."""

    width: int  # of hidden states
    heads: int
    numbers: int  # F

    @property
    def first(self) -> int:
        """How many the first map reads."""
        return self.width + 4 * self.heads

    @property
    def asked(self) -> bool:
        """Queries were asked."""
        return self.numbers > self.first + ENDS

    def first_of(self, count: int) -> Float[Tensor, "F1 G1"]:
        """A view of so many numbers and the constant."""
        everything = torch.eye(self.numbers + 1, dtype=torch.float64)
        return everything[:, [*range(count), self.numbers]]

    def second(self, first: Float[Tensor, "G1 K"], asked: bool) -> Float[Tensor, "F1 H1"]:
        """A view of what the first map says, and of what the second one reads beside it."""
        said = self.first_of(self.first) @ first
        rest = self.first_of(self.numbers if asked else self.first + ENDS)[:, self.first :]
        return torch.cat([said, rest], dim=1)


def _solve(
    fitted: Sequence[Sums], held_out: Sequence[Sums], texts: list[Any], width: int
) -> Fitted:
    """The ridge that foretells the held-out texts best, one for all layers."""
    layout = _Layout(width, fitted[0].xy.shape[1], len(fitted[0].xx) - 1)
    view, found = layout.first_of(layout.first), {}
    own, other = ([sums.seen_by(view) for sums in each] for each in (fitted, held_out))
    for ridge in RIDGES:
        maps = [sums.solve(ridge) for sums in own]
        found[ridge] = maps, _r2_of_layers(other, maps)
    tried = {ridge: float(explained.mean()) for ridge, (_, explained) in found.items()}
    best = max(tried, key=tried.__getitem__)
    first, explained = found[best]
    second, well = {}, {}
    for name in ("end", "asked") if layout.asked else ("end",):
        views = [layout.second(_round(map_, width), name == "asked") for map_ in first]
        own, other = (
            [sums.seen_by(view) for sums, view in zip(each, views, strict=True)]
            for each in (fitted, held_out)
        )
        maps = [sums.solve(SECOND) for sums in own]
        second[name], well[name] = _linear(maps), _r2_of_layers(other, maps)
    whole = _linear(first)
    weight, of_lengths = whole.weight.split([width, layout.first - width], dim=2)
    table = EchoTable(weight.half(), whole.bias, of_lengths, **second)
    return Fitted(table, explained, well, best, tried, texts)


def _r2_of_layers(sums: Sequence[Sums], maps: Sequence[Tensor]) -> Float[Tensor, "L K"]:
    return torch.stack([own.r2(map_) for own, map_ in zip(sums, maps, strict=True)])


def _round(first: Float[Tensor, "G1 K"], width: int) -> Float[Tensor, "G1 K"]:
    """A first map as a file keeps it: weights of hidden states in fp16."""
    return torch.cat([first[:width].half().double(), first[width:].float().double()])


def _linear(maps: Sequence[Float[Tensor, "G1 K"]]) -> Linear:
    every = torch.stack([*maps]).float()
    return Linear(every[:, :-1].transpose(1, 2).contiguous(), every[:, -1])


def fit_record(
    model: Any, tokenizer: Any, name: str, plan: Plan, fitted: Fitted
) -> dict[str, Any]:
    """Everything about a fit but the table, ready for JSON."""
    own = asdict(plan) | {"model": name, "ridge": fitted.ridge}
    own["tried"] = {str(ridge): round(mean, 4) for ridge, mean in fitted.tried.items()}
    own |= {"identity": fingerprint.identity(model), "fingerprint": fingerprint.of_model(model)}
    own |= {"tokenizer": fingerprint.of_tokenizer(tokenizer), "machine": provenance(model.device)}
    layers, heads = fitted.explained.shape
    own |= {"layers": layers, "kv_heads": heads, "read": sum(x["tokens"] for x in fitted.texts)}
    own["explained"] = _as_lists(fitted.explained)
    own |= {f"explained_{name}": _as_lists(well) for name, well in fitted.second.items()}
    return own | {"texts": fitted.texts}


def _as_lists(explained: Float[Tensor, "L K"]) -> list[list[float]]:
    return [[round(x, 4) for x in row] for row in explained.tolist()]
