"""Shape letters and small records shared by every room.

B prompts of one length, H query heads, K KV heads, G = H / K query heads per KV head, S slots held
now, Q queries at hand, N candidates (slots a policy may drop), D head width, M hidden width.

The shapes are checked while the tests run (jaxtyping and beartype); without jaxtyping installed
they are plain annotations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from kvtrim.prompts.spans import Spans

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
else:
    try:
        from jaxtyping import Bool, Float, Int
    except ModuleNotFoundError:  # pragma: no cover

        class _Unchecked:
            def __class_getitem__(cls, item: tuple[type, str]) -> type:
                return item[0]

        Bool = Float = Int = _Unchecked

__all__ = [
    "Aim",
    "Bool",
    "Counts",
    "Float",
    "Int",
    "Kept",
    "LayerView",
    "Noted",
    "Probed",
    "Refitted",
    "Room",
    "Scores",
    "Spans",
    "Target",
    "Tensor",
]

Scores = Float[Tensor, "B K N"]
"""How much each candidate slot matters to each KV head, fp32, higher = keep."""

Counts = Int[Tensor, "B K"]
"""How many candidates each KV head keeps; lives on the CPU."""


@dataclass(frozen=True)
class Probed:
    """Which part of a prompt a probe is about, in positions: [start, stop)."""

    start: int
    stop: int
    sensitivity: Float[Tensor, "L Q"] | None = None
    """Of each token of the probe in each layer, for policies that `differentiate`."""


@dataclass(frozen=True)
class Noted:
    """What attention may note on its way: the largest weight that some slots receive."""

    slots: Int[Tensor, " N"]  # before the queries' own; a softmax over both is noted
    weights: Float[Tensor, "B Q"] | None = None  # what each query's attention is multiplied by


@dataclass(frozen=True)
class LayerView:
    """One layer as a policy sees it: the slots it holds and the last queries that looked at them.

    Slots are in ascending position and the newest Q slots belong to the Q queries, in order. All
    prompts of a view have the same length; padding never reaches a policy. Where KV heads hold
    different numbers of slots, `lengths` counts them and the slots behind are garbage.
    """

    index: int  # this layer, 0-based among the layers that kvtrim manages
    layers: int  # how many layers kvtrim manages
    keep: int  # entries per KV head asked for, protected slots included
    tokens: int  # tokens of each prompt that this layer has read
    queries: Float[Tensor, "B H Q D"]  # after RoPE
    keys: Float[Tensor, "B K S D"]  # after RoPE
    values: Float[Tensor, "B K S E"]
    positions: Int[Tensor, "B K S"]  # of each slot in the prompt, padding not counted
    scale: float  # the model's own factor on query @ key
    softcap: float | None = None  # Gemma 2 squashes logits: cap * tanh(logit / cap)
    lengths: Counts | None = None  # slots per KV head where they differ
    carried: Float[Tensor, "B K S"] | None = None  # the policy's running statistic, see `observe`
    received: Float[Tensor, "B H N"] | None = None  # what attention noted, see `Policy.compared`
    decoding: bool = False  # the prompt is over
    probed: Probed | None = None  # the queries are a probe's, and this is what it is about
    sensitivity: Float[Tensor, "B Q"] | None = None  # of each query of a probe: |d objective / d
    # what this layer's attention adds|, given where the policy `differentiates`
    hidden: Float[Tensor, "B Q M"] | None = None  # what the layer's attention received for each
    # query's token, after the norm; given where the policy `reads_hidden`
    output: Callable[[], Float[Tensor, "H E M"]] | None = None  # W_O per query head
    factor: Callable[[], Float[Tensor, "H E E"]] | None = None  # R with |v @ W_O| = |v @ R.T|
    rotate: Callable[[Float[Tensor, "N D"], Int[Tensor, " N"]], Tensor] | None = None
    # RoPE: vectors turned on by so many positions each; given where the policy `turns`
    bias: Float[Tensor, "B K S"] | None = None  # added to the logits of each slot, see `refit`
    spans: tuple[Spans, ...] = ()  # named parts, one mapping per prompt; empty if none were given
    whole: bool = False  # the prompt is complete, and nothing of it was evicted
    asked: Float[Tensor, "B H r D"] | None = None  # some of the prompt's own queries, in order and
    # turned to a position behind it; given with `whole` where the policy has `asked`


@dataclass(frozen=True)
class Aim:
    """What one layer's full cache answers to reference queries of one prompt, fp32."""

    queries: Float[Tensor, "K Q D"]  # those of a group's heads one after the other
    out: Float[Tensor, "K Q E"]  # attention over every entry
    lse: Float[Tensor, "K Q"]  # log of the sum of the exponentiated logits


@dataclass(frozen=True)
class Refitted:
    """What a layer's kept entries became."""

    values: Float[Tensor, "K S E"]
    bias: Float[Tensor, "K S"] | None  # to be added to the logits of each entry; None is 0


@dataclass(frozen=True)
class Room:
    """What a budget may spend on one layer."""

    layer: int
    layers: int
    heads: int  # heads that hold entries of their own (KV heads, or query heads in paper presets)
    keep: int  # entries per head asked for, protected slots included
    asked: float  # the same before rounding: 99.9 for keep=0.3 of 333 tokens
    protected: int  # slots that are kept whatever their score (sinks and recent window)
    tokens: int  # tokens that this layer has read
    group: int = 1  # query heads that share one of `heads`

    @property
    def candidates(self) -> int:
        """Slots per head that compete."""
        return max(0, self.tokens - self.protected)

    @property
    def free(self) -> int:
        """Entries per head left for candidates: never negative, never more than there are."""
        return max(0, min(self.keep - self.protected, self.candidates))


@dataclass(frozen=True)
class Target:
    """The model that a method is about to be used on, as far as its parts may care."""

    name: str  # what messages call it
    layers: int  # how many layers kvtrim manages
    heads: int  # query heads of each
    identity: Callable[[], str | None]  # hash of its weights; None where there are none
    kv_heads: int | None = None  # where known
    width: int | None = None  # of its hidden states, where known


@dataclass(frozen=True)
class Kept:
    """Which slots survive: per head ascending slot numbers, padded to one width with -1."""

    slots: Int[Tensor, "B K P"]
    counts: Counts

    @property
    def uniform(self) -> bool:
        """Every head keeps the same number of slots."""
        return bool((self.counts == self.slots.shape[-1]).all())
