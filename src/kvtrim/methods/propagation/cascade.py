"""Cascade: each layer passes on fewer tokens than it read, so time and memory shrink together.

Layer l of L passes on the share rho of its context, the tokens before the recent ones:

    rho_l = (1 - decay) * (cos(pi * l / L) + 1) / 2 + decay
    c_{l+1} = int(c_l * rho_l), unless that is `min_context` or less

The recent tokens, a fixed share of the prompt, and its last one always go on; they are asked for
what they attend to in the context, later ones with more weight. Layers keep all that they read, so
kept sets are nested. Without `decay` the budget sets it: the largest mean that `keep` allows. The
answer stays as well, unless it is cut in blocks (preset `generation`, `region=blocks`).

Paper: Yang et al. 2024 (PyramidInfer), https://arxiv.org/abs/2405.12532, section 3.
Code:  mutonix/pyramidinfer@61ac641, models/modeling_llama_pyramidinfer.py.
Ours:  attention of the recent rows is computed in blocks, never n x n.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import cos, pi
from typing import Annotated

from kvtrim.methods.budgets.base import everyone
from kvtrim.methods.policies import ops
from kvtrim.methods.policies.base import Policy
from kvtrim.methods.policies.pyramidinfer import votes
from kvtrim.methods.propagation.base import Propagation
from kvtrim.methods.ranges import Positive, Range, Share, Some, Tokens
from kvtrim.methods.selection import select
from kvtrim.types import Int, LayerView, Tensor

STEPS = 1000
"""Decays that are tried. Lengths do not always shrink with the decay: a layer that would pass on
`min_context` tokens or fewer passes on all it has."""


@dataclass(frozen=True)
class Cascade(Propagation):
    recent: Annotated[float, Range(0, 1, below=True)] = 0.01  # share of the prompt whose last
    # tokens are asked and always go on
    decay: Share | None = None  # what the deepest layer would pass on; none: what `keep` allows
    interval: Some = 1  # tokens are chosen at every so many layers
    sinks: Tokens = 4  # first tokens, which always go on
    min_context: Tokens = 64  # a layer passes on more context tokens than this, or all it has
    weight: Positive = 1.2  # of the last token's attention, relative to the oldest recent one's

    @property
    def holds_more(self) -> str:
        if self.decay is not None:
            return f"decay={self.decay} says what layers pass on, not keep"
        return (
            f"layers that would pass on {self.min_context} tokens or fewer pass on all they have"
        )

    @property
    def holds_less(self) -> str:
        return self.holds_more

    def least(self, tokens: int, layers: int) -> int:
        if self.decay is not None:
            return 1
        return -(-sum(self.lengths(tokens, layers, self.decay_for(tokens, layers, 1))) // layers)

    def chooses(self, layer: int, layers: int) -> bool:
        return layer > 0 and layer % self.interval == 0 and layer < layers - 1

    def choose(self, view: LayerView, policy: Policy, prompt: int) -> Int[Tensor, "B T"] | None:
        slots, recent = view.keys.shape[2], 1 + self._recent(prompt)
        decay = self.decay_for(prompt, view.layers, view.keep)
        context = slots - recent
        count = self._passed_on(context, view.index, view.layers, decay, self._floor(prompt))
        if count >= context:
            return None
        sums = votes(ops.newest(view, recent), self.weight)[..., :context]
        scores = sums.mean(dim=1, keepdim=True)
        sinks = min(self.sinks, count)
        counts = everyone(count - sinks, scores)
        return select(scores, counts, slots, sinks=sinks, recent=recent).slots[:, 0]

    def decay_for(self, prompt: int, layers: int, keep: int) -> float:
        """The decay given, or the largest with which layers read at most `keep` tokens on average.

        Where none does, the one with which they read least.
        """
        return self.decay if self.decay is not None else _largest(self, prompt, layers, keep)

    def lengths(self, prompt: int, layers: int, decay: float) -> list[int]:
        """Tokens that each layer reads of a prompt."""
        recent, floor, lengths = 1 + self._recent(prompt), self._floor(prompt), [prompt]
        for layer in range(layers - 1):
            context = lengths[-1] - recent
            if self.chooses(layer, layers):
                context = self._passed_on(context, layer, layers, decay, floor)
            lengths.append(context + recent)
        return lengths

    def _passed_on(self, context: int, layer: int, layers: int, decay: float, floor: int) -> int:
        rho = (1 - decay) * (cos(pi * layer / layers) + 1) / 2 + decay
        less = int(context * rho)
        return less if context > floor and less > floor else context

    def _recent(self, prompt: int) -> int:
        return int(prompt * self.recent)

    def _floor(self, prompt: int) -> int:
        return min(self.min_context, prompt - 1 - self._recent(prompt))


@lru_cache(maxsize=256)
def _largest(cascade: Cascade, prompt: int, layers: int, keep: int) -> float:
    totals = {}
    for step in range(STEPS, -1, -1):
        totals[step / STEPS] = total = sum(cascade.lengths(prompt, layers, step / STEPS))
        if total <= keep * layers:
            return step / STEPS
    return min(totals, key=totals.__getitem__)
