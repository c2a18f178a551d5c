"""What every scoring rule has in common.

A policy scores; it never counts, selects or touches a cache.
"""

from abc import ABC, abstractmethod
from math import log
from typing import ClassVar

import torch

from kvtrim.errors import UsageError
from kvtrim.methods.ranges import Declared
from kvtrim.types import Counts, Float, LayerView, Noted, Scores, Target, Tensor

WHOLE = 2**31 - 1
"""The `lookback` of a rule that reads every query of the prompt."""


class Policy(Declared, ABC):
    """A scoring rule: one layer's view to one score per candidate slot and KV head.

    Subclasses are frozen dataclasses, one per file, and final. `lookback` is abstract on purpose:
    a rule that does not say which queries it needs cannot be built.
    """

    sinks: int = 0
    """First slots of the prompt that are kept whatever their score."""

    first_stage: float = 1.0
    """The share of a head's entries that `score` chooses; `rescore` chooses the others."""

    carries: ClassVar[bool] = False
    """It keeps a running statistic per slot, which `observe` updates at every forward pass."""

    probes: ClassVar[bool] = False
    """It scores what `observe` saw in a probe that is read once the prompt is complete."""

    differentiates: ClassVar[bool] = False
    """It needs the gradients of its probe: `layer.sensitivity`."""

    @property
    def reads_hidden(self) -> bool:
        """Whether it needs `layer.hidden`: what the attention receives for each query's token."""
        return False

    asked: int = 0
    """How many of the prompt's queries per KV head, turned behind it, are `layer.asked`."""

    @property
    def turns(self) -> bool:
        """Whether vectors are turned for it to other positions than those where they were read."""
        return self.asked > 0

    chunk: int = 0
    """Tokens of the prompt that one pass of its probe is about."""

    foresees: ClassVar[bool] = False
    """It scores each token when that is read, by what its layer makes of it: `foresee`."""

    @property
    def at_sight(self) -> bool:
        """Whether a layer's queries and entries are all that it scores by: nothing that another
        pass, another layer or another position has to tell.
        """
        return not (self.carries or self.probes or self.foresees or self.turns)

    local: int = 0
    """So many of the newest tokens stay at every cut after the prompt, or half of the budget."""

    def fitted(self, target: Target) -> "Policy":
        """This policy, made ready for one model.

        Raises:
            UsageError: it cannot serve that model.
        """
        return self

    def foresee(
        self,
        index: int,
        hidden: Float[Tensor, "B Q M"],
        keys: Float[Tensor, "B K Q D"],
        values: Float[Tensor, "B K Q E"],
    ) -> Float[Tensor, "B N Q"]:
        """What new tokens are worth to a layer (if `foresees`): `layer.carried` of `score`.

        Args:
            index: the layer, as in `LayerView`.
            hidden: what its attention receives for each token.
            keys, values: what it makes of them.
        """
        raise TypeError(f"{type(self).__name__} does not score a token by its hidden state")

    def observes(self, decoding: bool) -> bool:
        """Whether `observe` is wanted for passes over the prompt, or (`decoding`) after it."""
        return self.carries

    @abstractmethod
    def lookback(self) -> int:
        """How many of the last queries `score` reads; `WHOLE` is all of the prompt's."""

    def remembers(self, settled: bool = True) -> int:
        """How many queries a cut while generating needs of those that were read before it.

        Args:
            settled: layers do not compete, or what each of them won is known already.
        """
        return self.lookback()

    def recent(self, keep: int) -> int:
        """How many of the newest slots are kept whatever their score, out of `keep`."""
        return 0

    def compared(self, layer: LayerView) -> Noted | None:
        """What `observe` wants to know of a probe's attention, which may note it on its way.

        Where it could, `layer.received` holds it: the largest weight of each of these slots.
        """
        return None

    def observe(self, layer: LayerView) -> Float[Tensor, "B K S"]:
        """Update the running statistic of every slot from this pass's queries (if `carries`).

        `layer.queries` are all queries of the pass and `layer.carried` is the statistic before it,
        0 for new slots. What is returned becomes `layer.carried` of `score` and of the next pass.
        """
        raise TypeError(f"{type(self).__name__} keeps no running statistic")

    @abstractmethod
    def score(self, layer: LayerView) -> Scores:
        """Score the slots, higher = keep: all S of them, or the first S - recent(keep)."""

    def first_entries(self, counts: Counts, keep: int) -> Counts:
        """How many of a head's `counts` entries the first stage chooses."""
        return (counts * self.first_stage).long()

    def rescore(self, layer: LayerView, scores: Scores) -> Scores:
        """Scores of the second stage from those of the first, of the same shape."""
        raise TypeError(f"{type(self).__name__} chooses in one stage")

    def preference(self, layer: LayerView, scores: Scores) -> Float[Tensor, " B"]:
        """How much of a model-wide budget this layer asks for, relative to other layers.

        The entropy of its candidates' scores [B, K, N], as a share of the largest possible one, so
        that a layer whose scores are flat gets more (LAVa, https://arxiv.org/abs/2509.09754).
        Scores below 0 count as 0.
        """
        flat = scores.flatten(1).double().clamp(min=0)
        shares = flat / flat.sum(dim=1, keepdim=True).clamp(min=1e-300)
        return -torch.xlogy(shares, shares).sum(dim=1) / log(max(2, flat.shape[1]))


class WindowPolicy(Policy):
    """A rule that asks the last queries, whose own slots always stay, and pools their answers."""

    window: int
    """How many last queries are asked."""

    kernel: int
    """Width of the pooling, odd."""

    def lookback(self) -> int:
        return self.window

    def recent(self, keep: int) -> int:
        return self.window


def checked_score(policy: Policy, layer: LayerView) -> Scores:
    """What a policy scores a layer, checked: all S slots, or the first S - recent of them.

    Raises:
        UsageError: what it gave is of another shape, or holds NaN; names the policy.
    """
    slots, recent = layer.keys.shape[2], policy.recent(layer.keep)
    return _check(policy, "score", policy.score(layer), layer, max(0, slots - recent), recent)


def checked_rescore(policy: Policy, layer: LayerView, scores: Scores) -> Scores:
    """What a policy's second stage makes of its scores, checked; errors as `checked_score`."""
    found = policy.rescore(layer, scores)
    return _check(policy, "rescore", found, layer, scores.shape[-1], policy.recent(layer.keep))


def checked_statistic(policy: Policy, layer: LayerView) -> Float[Tensor, "B K S"]:
    """A policy's running statistic of every slot, checked; errors as `checked_score`."""
    return _check(policy, "observe", policy.observe(layer), layer, layer.keys.shape[2], 0)


def _check(
    policy: Policy, what: str, found: object, layer: LayerView, least: int, recent: int
) -> Tensor:
    batch, heads, slots = layer.keys.shape[:3]
    name = f"{type(policy).__module__}.{type(policy).__name__}.{what}"
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise UsageError(f"{name} gave {_kind(found)}; it has to give a tensor of floats")
    shape = list(found.shape)
    if shape[:2] != [batch, heads] or len(shape) != 3 or not least <= shape[2] <= slots:
        wanted = f"{slots}" if least == slots else f"{least} to {slots}"
        raise UsageError(
            f"{name} gave shape {shape}, expected [{batch}, {heads}, {wanted}]: prompts, KV "
            "heads and slots"
        )
    wrong = found.isnan()
    if layer.lengths is not None:  # slots behind a head's last one are garbage
        ends = (layer.lengths - recent).to(found.device)[..., None]
        wrong &= torch.arange(found.shape[2], device=found.device) < ends
    if bool(wrong.any()):
        raise UsageError(
            f"{name} gave NaN in layer {layer.index}; where the model's own keys or values are "
            "NaN already, load it with dtype float32"
        )
    return found


def _kind(found: object) -> str:
    return f"a tensor of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
