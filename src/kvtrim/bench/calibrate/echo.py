"""Fitting echo: ridge regression of the log of KVzip's scores on hidden states, in closed form.

Each text is read once and probed as `kvzip` does. Per layer only sums over its tokens are kept
(x x', x y, y y of hidden states x and log scores y), so memory does not depend on how much text is
read; every sixth text is held out, chooses the ridge and gives R^2 per layer and head.

Paper: KVzap, https://arxiv.org/abs/2601.07891 (gradient descent on the logs of KVzip+'s scores).
Ours:  closed form over sums; the held-out texts choose the ridge.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from kvtrim.bench.provenance import provenance
from kvtrim.errors import UsageError
from kvtrim.hf.attach import attach
from kvtrim.hf.models import fingerprint
from kvtrim.hf.replay import Recording, record
from kvtrim.methods.budgets import Global
from kvtrim.methods.echo_tables import EchoTable
from kvtrim.methods.method import Method
from kvtrim.methods.policies.kvzip import KVzip
from kvtrim.prompts import encode_context, frame, repeat_words
from kvtrim.types import Float, LayerView, Scores, Tensor

Target = Literal["kvzip", "kvzip-plus"]
Report = Callable[[str, int, int], None]

RIDGES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)  # shares of the mean variance, to choose from
LEAST = 1e-6  # added to a score before its log
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
    """Sums over tokens of one layer: all that the regression needs."""

    xx: Float[Tensor, "M1 M1"]  # the last row and column belong to the constant 1
    xy: Float[Tensor, "M1 K"]
    yy: Float[Tensor, " K"]

    @classmethod
    def empty(cls, width: int, heads: int) -> "Sums":
        """No token yet."""
        zeros = (width + 1, width + 1), (width + 1, heads), (heads,)
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in zeros))

    def add(self, x: Float[Tensor, "n M"], y: Float[Tensor, "n K"]) -> None:
        """Tokens with their hidden states and log scores."""
        x, y = x.double().cpu(), y.double().cpu()
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += (y * y).sum(dim=0)

    @property
    def count(self) -> float:
        """Tokens so far."""
        return float(self.xx[-1, -1])

    def solve(self, ridge: float) -> Float[Tensor, "M1 K"]:
        """Weights and, in the last row, bias of the ridge regression on standardised states."""
        mean, target = self.xx[-1, :-1] / self.count, self.xy[-1] / self.count
        spread = self.xx[:-1, :-1] / self.count - mean[:, None] * mean
        size = spread.diagonal().clamp(min=1e-12).sqrt()
        spread = spread / (size[:, None] * size)
        both = (self.xy[:-1] / self.count - mean[:, None] * target) / size[:, None]
        spread.diagonal().add_(ridge)
        weight = torch.linalg.solve(spread, both) / size[:, None]
        return torch.cat([weight, (target - mean @ weight)[None]])

    def r2(self, weight: Float[Tensor, "M1 K"]) -> Float[Tensor, " K"]:
        """R^2 of given weights on these tokens, per head."""
        error = (weight * (self.xx @ weight)).sum(dim=0) - 2 * (weight * self.xy).sum(dim=0)
        mean = self.xy[-1] / self.count
        return 1 - (error + self.yy) / (self.yy - self.count * mean * mean).clamp(min=1e-12)


@dataclass(frozen=True)
class Fitted:
    """A table, and how well it foretells texts that it was not fitted on."""

    table: EchoTable
    explained: Float[Tensor, "L K"]  # R^2 on the held-out texts
    ridge: float
    tried: dict[float, float]  # mean R^2 by ridge
    texts: list[dict[str, Any]]


@dataclass(frozen=True)
class _Noting(KVzip):
    """KVzip, noting what its probe found."""

    notes: dict[int, Tensor] = field(default_factory=dict, compare=False)

    def score(self, layer: LayerView) -> Scores:
        scores = super().score(layer)
        self.notes[layer.index] = scores.clone()  # the store is cut in place
        return scores


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
        UsageError: fewer than two texts of at least 64 tokens, so that none can be held out.
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
            ids = ids[: len(words.prefix) + min(plan.length, total - done)]
            own = len(ids) - len(words.prefix)
            if own < 64:
                continue
            report(name, done, total)
            held_out = len(noted) % HOLD_OUT == HOLD_OUT - 1 or len(noted) == 1
            recording = record(model, torch.tensor([ids], device=model.device), None, words)
            _add(sums.setdefault(held_out, []), recording, plan, len(words.prefix))
            digest = hashlib.sha256(text.encode()).hexdigest()
            noted.append({"name": name, "tokens": own, "held_out": held_out, "sha256": digest})
            done += own
    if len(sums) < 2:
        raise UsageError(
            "echo is fitted on some texts and judged on others: give at least two of 64 tokens"
        )
    return _solve(sums[False], sums[True], noted)


def scores_of(recording: Recording, target: Target) -> list[Float[Tensor, "K n"]]:
    """What KVzip's probe says of every entry of each layer."""
    policy = _Noting(plus=target == "kvzip-plus")
    recording.cache(Method(policy, budget=Global()), policy.sinks + 1)
    return [policy.notes[layer][0] for layer in sorted(policy.notes)]


def _add(sums: list[Sums], recording: Recording, plan: Plan, prefix: int) -> None:
    """One text's tokens, those before the context left out: they are not probed."""
    found = scores_of(recording, plan.target)
    for layer, (call, scores) in enumerate(zip(recording.calls, found, strict=True)):
        if call.hidden is None:
            raise UsageError("the pass was recorded without hidden states")
        x, y = call.hidden[0, prefix:], (scores[:, prefix:] + LEAST).log().T
        if layer == len(sums):
            sums.append(Sums.empty(x.shape[1], y.shape[1]))
        sums[layer].add(x, y)


def _solve(fitted: Sequence[Sums], held_out: Sequence[Sums], texts: list[Any]) -> Fitted:
    """The ridge that foretells the held-out texts best, one for all layers."""
    found = {}
    for ridge in RIDGES:
        weights = [sums.solve(ridge) for sums in fitted]
        explained = [sums.r2(weight) for sums, weight in zip(held_out, weights, strict=True)]
        found[ridge] = torch.stack(weights), torch.stack(explained)
    tried = {ridge: float(explained.mean()) for ridge, (_, explained) in found.items()}
    best = max(tried, key=tried.__getitem__)
    weight, explained = found[best]
    table = EchoTable(weight[:, :-1].transpose(1, 2).half(), weight[:, -1].float())
    return Fitted(table, explained, best, tried, texts)


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
    own["explained"] = [[round(x, 4) for x in row] for row in fitted.explained.tolist()]
    return own | {"texts": fitted.texts}
