"""Propagation in a model: decoder layers are handed the tokens that go on, and no others.

A layer hook gathers the hidden states once, above the layer at which tokens were chosen, and what
says where the tokens stand (rotary embeddings, position ids) for every layer from there on.
"""

import threading
from typing import Any
from weakref import ref

import torch

from kvtrim.engine.layer import Call
from kvtrim.engine.propagation import Narrowing
from kvtrim.hf.base import BaseCache, cache_in
from kvtrim.hf.models.architectures import Layout
from kvtrim.types import Int, Tensor

Hooked = tuple[tuple[Any, ...], dict[str, Any]]


class _Block(threading.local):
    """What the decoder layer that this thread is in reads from, and what its MLP was spared."""

    filter: "_Filter | None" = None  # asked by the first layers of a pass with no cache
    cache: "ref[BaseCache] | None" = None
    spared: tuple[Tensor, Tensor] | None = None  # columns that it reads, all that it was given


_block = _Block()


def left_block() -> None:
    """This thread is in no decoder layer any more."""
    _block.cache, _block.spared = None, None


def narrow_layer(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hooked | None:
    """What decoder layer `number` reads instead, if a part of the prompt goes on to it."""
    cache = cache_in(kwargs)
    left_block()
    if not isinstance(cache, BaseCache):
        return None
    _block.cache = ref(cache)
    narrowing = cache.narrowing
    if narrowing is None or cache.closed_up or number <= narrowing.layer:
        return None
    if number == narrowing.layer + 1:
        args, kwargs = _hidden(args, kwargs, narrowing.step)
    where = {
        name: _gather(kwargs[name], narrowing.columns)
        for name in ("position_embeddings", "position_ids")
        if kwargs.get(name) is not None
    }
    return args, {**kwargs, **where}


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any], columns: Int[Tensor, "B w"]) -> Hooked:
    if args:
        return (_gather(args[0], columns), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": _gather(kwargs["hidden_states"], columns)}


def _gather(given: Any, columns: Int[Tensor, "B w"]) -> Any:
    """The columns of [B or 1, n, ...], or of each tensor of a tuple; others as they are."""
    if isinstance(given, tuple):
        return tuple(_gather(each, columns) for each in given)
    rows = given.expand(columns.shape[0], *given.shape[1:])
    at = columns.to(given.device)
    at = at.view(*at.shape, *[1] * (given.ndim - 2)).expand(-1, -1, *given.shape[2:])
    return rows.gather(1, at)


class PartOfMLP:
    """Spares the MLP of the layer at which tokens are chosen those that go nowhere.

    A layer reads the whole prompt there and its output is gathered above it; of the tokens that
    are then dropped nobody asks what the MLP made. They get zeros.
    """

    def __init__(self, block: torch.nn.Module, number: int):
        self._number = number
        mlp = getattr(block, "mlp", None)
        modules = [mlp] if isinstance(mlp, torch.nn.Module) else []
        self.hooks = [module.register_forward_pre_hook(self._take) for module in modules]
        self.hooks += [module.register_forward_hook(self._give_back) for module in modules]

    def _take(self, mlp: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        cache = None if _block.cache is None else _block.cache()
        if cache is None or cache.narrowing is None or cache.closed_up:
            return None
        narrowing = cache.narrowing
        if narrowing.layer != self._number:
            return None
        _block.spared = narrowing.step, args[0]
        return (_gather(args[0], narrowing.step), *args[1:])

    def _give_back(self, mlp: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if _block.spared is None:
            return None
        (columns, given), _block.spared = _block.spared, None
        at = columns.to(output.device)[..., None].expand(output.shape)
        whole = output.new_zeros(*given.shape[:2], output.shape[2])
        return whole.scatter(1, at, output)


class _Filtered(Exception):
    """The filter layer has been asked; nothing above it runs."""


class _Filter:
    """Stands for a session at the filter layer."""

    def __init__(self, cache: BaseCache, layer: int):
        self.cache, self.layer = cache, layer
        self.narrowing: Narrowing | None = None

    def attend(self, index: int, call: Call) -> Tensor:
        """Choose what is read again, and stop the pass."""
        self.narrowing = self.cache.restart(index, call)
        raise _Filtered


def active_filter(number: int, cache: Any) -> "_Filter | None":
    """What a managed layer hands its queries and keys to while this thread filters a prompt."""
    found = _block.filter
    return found if found is not None and cache is None and found.layer == number else None


def is_filtering() -> bool:
    """Whether the pass that this thread is in asks which part of a prompt to read."""
    return _block.filter is not None


def restart(parts: Layout, cache: BaseCache, kwargs: dict[str, Any]) -> Hooked | None:
    """A decoder's arguments, all by name, for the part that its first layers choose."""
    layer = cache.filter_layer
    if layer is None:
        return _closed_up(cache, kwargs)
    found = _run_filter(parts, cache, layer, kwargs)
    if found is None:
        return None
    kwargs = dict(kwargs)
    name = "inputs_embeds" if kwargs.get("inputs_embeds") is not None else "input_ids"
    given = kwargs.pop(name)
    real = found.now.mask().long().to(given.device)
    kwargs[name] = _gather(given, found.columns)
    kwargs["position_ids"] = _start(kwargs, given) + (real.cumsum(dim=1) - 1).clamp(min=0)
    kwargs["attention_mask"] = real
    return (), kwargs


def _start(kwargs: dict[str, Any], given: Tensor) -> Int[Tensor, "B 1"]:
    """The position of each prompt's first token, as the model was told or would count itself."""
    mask, at = kwargs.get("attention_mask"), kwargs.get("position_ids")
    first = torch.zeros(given.shape[0], dtype=torch.int64, device=given.device)
    if mask is not None:
        first = (mask != 0).long().argmax(dim=1).to(given.device)
    if at is None:
        return first[:, None]
    return at.expand(given.shape[0], -1).gather(1, first[:, None])


def _run_filter(
    parts: Layout, cache: BaseCache, layer: int, kwargs: dict[str, Any]
) -> Narrowing | None:
    """Run the first layers on everything, storing nothing, and ask the filter layer."""
    others = {k: v for k, v in kwargs.items() if v is not cache and k != "use_cache"}
    found = _block.filter = _Filter(cache, layer)
    try:
        parts.decoder(**others, use_cache=False)
    except _Filtered:
        pass
    finally:
        _block.filter = None
    return found.narrowing


def _closed_up(cache: BaseCache, kwargs: dict[str, Any]) -> Hooked | None:
    """Later tokens stand behind the part that was read, not behind the whole prompt."""
    by = cache.closed_up
    if not any(by):
        return None
    given = kwargs.get("position_ids")
    if given is None:
        embeds = kwargs.get("inputs_embeds")
        fed: Any = kwargs["input_ids"] if embeds is None else embeds
        given = torch.arange(fed.shape[1], device=fed.device)[None] + cache.seen
    up = torch.tensor(by, device=given.device)[:, None]
    return (), {**kwargs, "position_ids": given - up}
