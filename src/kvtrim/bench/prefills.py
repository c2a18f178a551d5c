"""Prefills to compare: by all layers, and above one layer by the tokens chosen there alone."""

from dataclasses import dataclass
from typing import Any

import torch

from kvtrim import ops
from kvtrim.budgets import Keep
from kvtrim.engine.call import Call
from kvtrim.hf.cache import Cache
from kvtrim.hf.keyword import passing
from kvtrim.settings import find
from kvtrim.types import Float, Int, LayerView, Tensor

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
    cache, method, looked = Cache(model, "full"), find(METHOD, tokens=tokens), Looked([], [])
    policy, slots = method.policy, ids.shape[1]

    def look(index: int, call: Call) -> None:
        view = LayerView(
            index=index,
            layers=len(cache.managed),
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

    cache.session.tap = look
    return _final(model, ids, cache), looked


def narrowed_prefill(
    model: Any, ids: Int[Tensor, "1 n"], layer: int, tokens: int | float = 0.2
) -> Final:
    """Read a prompt with propagation after a layer and no other loss; the model is attached."""
    return _final(model, ids, narrowed(model, layer=layer, tokens=tokens))


def narrowed(model: Any, **settings: Any) -> Cache:
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
            logits = model(input_ids=ids, **passing(cache), logits_to_keep=1).logits
    finally:
        hook.remove()
    return Final(states[0], logits[0, -1].double().cpu())
