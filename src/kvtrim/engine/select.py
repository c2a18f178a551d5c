"""What a method would keep, from queries, keys and values alone: no model, no generation."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from kvtrim.engine.layer import Call
from kvtrim.engine.session import Session
from kvtrim.errors import UsageError
from kvtrim.methods import auto
from kvtrim.methods.keep import Keep
from kvtrim.methods.method import Method
from kvtrim.methods.policies.output import output_factor
from kvtrim.methods.refit import Unchanged
from kvtrim.methods.settings import find
from kvtrim.prompts.spans import Given
from kvtrim.types import Float, Int, Target, Tensor

Layers = Tensor | Sequence[Tensor]
Rotate = Callable[[Float[Tensor, "N D"], Int[Tensor, " N"]], Tensor]


def select(
    method: str | Method,
    queries: Layers,
    keys: Layers,
    values: Layers,
    *,
    keep: int | float | str | Keep,
    scale: float | None = None,
    output: Sequence[Float[Tensor, "M HD"]] | None = None,
    hidden: Layers | None = None,
    rotate: Rotate | None = None,
    spans: Given | None = None,
    **settings: Any,
) -> list[list[Int[Tensor, " kept"]]]:
    """Positions that each layer and head keeps of one prompt.

    Args:
        method: a name of `METHODS`, `module:ATTRIBUTE`, or a `Method`.
        queries: after RoPE, [H, n, D] for one layer, [L, H, n, D] or a list of [H, n, D] for
            several.
        keys, values: likewise with the K KV heads.
        keep: the budget: entries, a share of the prompt, or bytes as text.
        scale: factor on query @ key; 1 / sqrt(D) by default.
        output: each layer's output projection `o_proj.weight` [M, H * D], for methods that weigh
            values by it.
        hidden: what each layer's attention receives, after the norm: [n, M] for one layer,
            [L, n, M] or a list of [n, M] for several; for methods that read it (echo).
        rotate: RoPE: vectors [N, D] and how many positions each is turned on, [N], to vectors; for
            methods that turn queries (expected-attention).
        spans: named parts of the prompt, see `kvtrim.Cache`.
        settings: parameters of the method, `preset` among them.

    Returns:
        `kept[layer][head]`, int64 positions in ascending order. Heads are KV heads, or query heads
        where the preset stores those.

    Raises:
        UsageError: shapes that do not fit together, a wrong parameter, or a method that reads
            hidden states and was given none.
    """
    stacks = [_as_layers(tensor) for tensor in (queries, keys, values)]
    if len({len(stack) for stack in stacks}) != 1:
        raise UsageError(
            f"queries, keys and values have {[len(s) for s in stacks]} layers; "
            "give the same number"
        )
    layers = len(stacks[0])
    if not layers:
        raise UsageError("there are no queries, keys and values: give those of a layer at least")
    for index, (q, k, v) in enumerate(zip(*stacks, strict=True)):
        _require_shapes(index, q, k, v, stacks[0][0])
    chosen = replace(find(method, **settings), refit=Unchanged())  # which selects nothing
    needed = chosen.policy.reads_hidden and chosen != auto.AUTO
    states = _states(hidden, stacks, needed)
    heads, kv_heads = stacks[0][0].shape[0], stacks[1][0].shape[0]
    width = states[0].shape[-1] if states else None
    target = Target("the given queries", layers, heads, lambda: None, kv_heads, width)
    chosen, _ = auto.resolve(chosen, target, aware=True)
    if chosen.policy.probes:
        raise UsageError(
            "this method reads its prompt a second time and so needs a model: use "
            "kvtrim.compress, or a kvtrim.Cache with model.generate"
        )
    session = Session(chosen, Keep.parse(keep), layers, spans=spans)
    session.begin(rows=1, columns=stacks[0][0].shape[1])
    _filter(session, stacks)
    for index, (q, k, v) in enumerate(zip(*stacks, strict=True)):
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        if session.narrowing is not None:
            q, k, v = (x[:, session.narrowing.columns[0].to(x.device)] for x in (q, k, v))
        call = Call(q[None], k[None], v[None], factor, rotate=rotate)
        if states:
            call = replace(call, hidden=_of_those_read(session, states[index])[None])
        if output is not None:
            weight = output[index].unflatten(1, (q.shape[0], -1)).permute(1, 2, 0)
            call = replace(
                call,
                output=partial(torch.Tensor.detach, weight),
                factor=partial(output_factor, weight),
            )
        session.attend(index, call)
    session.end()
    return [_positions(session, index) for index in range(len(stacks[0]))]


def _require_shapes(index: int, q: Tensor, k: Tensor, v: Tensor, first: Tensor) -> None:
    if (
        not q.ndim == k.ndim == v.ndim == 3
        or 0 in (*q.shape, *k.shape, *v.shape)
        or q.shape[0] % k.shape[0]
        or q.shape[1:] != k.shape[1:]
        or k.shape[:2] != v.shape[:2]
        or q.shape[:2] != first.shape[:2]
    ):
        raise UsageError(
            f"layer {index}: queries {list(q.shape)}, keys {list(k.shape)}, "
            f"values {list(v.shape)} do not fit; "
            "expected [H, n, D], [K, n, D], [K, n, E] with H a multiple of K, and the same H and "
            "n in every layer"
        )


def _of_those_read(session: Session, states: Float[Tensor, "n M"]) -> Float[Tensor, "w M"]:
    """Those of the tokens that the layer at hand reads."""
    narrowing = session.narrowing
    return states if narrowing is None else states[narrowing.columns[0].to(states.device)]


def _states(
    hidden: Layers | None, stacks: Sequence[Sequence[Tensor]], needed: bool
) -> list[Tensor]:
    """One tensor [n, M] for each layer; empty if none were given.

    Raises:
        UsageError: the method needs them, or they are not one of that length for each layer.
    """
    if hidden is None:
        if not needed:
            return []
        raise UsageError(
            "this method scores by what each layer's attention receives; pass hidden=[states, ...]"
        )
    states = list(hidden[None] if isinstance(hidden, Tensor) and hidden.ndim == 2 else hidden)
    columns = stacks[0][0].shape[1]
    if len(states) != len(stacks[0]) or any(
        one.ndim != 2 or one.shape[0] != columns for one in states
    ):
        raise UsageError(
            f"hidden has shapes {[list(one.shape) for one in states][:4]}; expected one "
            f"[{columns}, M] for each of {len(stacks[0])} layers"
        )
    return states


def _filter(session: Session, stacks: Sequence[Sequence[Tensor]]) -> None:
    """For methods that start again on a part of the prompt: choose it."""
    at = session.filter_layer
    if at is not None:
        session.restart(at, Call(*(stack[at][None] for stack in stacks), scale=1.0))


def _as_layers(given: Layers) -> list[Tensor]:
    if not isinstance(given, Tensor):
        return list(given)
    if given.ndim not in (3, 4):
        raise UsageError(
            f"expected [heads, n, D] or [layers, heads, n, D], got {list(given.shape)}"
        )
    return [given] if given.ndim == 3 else list(given)


def _positions(session: Session, index: int) -> list[Tensor]:
    store = session.state.layers[index].store
    if store is None:
        return []
    runs = zip(store.start[0].tolist(), store.length[0].tolist(), strict=True)
    positions = store.buffers["positions"].long()
    return [positions[first : first + count] for first, count in runs]
