"""Attaching to a model: attention by name, hooks that find the cache; detaching undoes all."""

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from transformers import PreTrainedModel

from kvtrim.engine.graph import Steps
from kvtrim.errors import CacheError, UsageError
from kvtrim.hf.architectures import OutputProjection, layout
from kvtrim.hf.attention import HANDLE, NAME, register
from kvtrim.hf.cache import Cache
from kvtrim.hf.keyword import cache_in
from kvtrim.hf.narrowing import Hooked, PartOfMLP, left_block, narrowed, restarted
from kvtrim.hf.probing import probe


class Attachment:
    """kvtrim on one model."""

    def __init__(self, model: PreTrainedModel, allow_untested: bool):
        self.layout = layout(model, allow_untested)
        self._model = ref(model)
        self._before = _implementations(model)
        register()
        model.set_attn_implementation(NAME)
        decoder = self.layout.decoder
        self._hooks = [
            decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            decoder.register_forward_hook(self._end, with_kwargs=True),
        ]
        for number, block in enumerate(self.layout.blocks):
            narrow = partial(_narrow, number)
            self._hooks.append(block.register_forward_pre_hook(narrow, with_kwargs=True))
            self._hooks += PartOfMLP(block, number).hooks
        for number, layer in enumerate(self.layout.managed):
            module = self.layout.attention[layer]
            output = OutputProjection(module, self.layout.query_heads)
            hand_over = partial(_hand_over, number, output)
            self._hooks.append(module.register_forward_pre_hook(hand_over, with_kwargs=True))

    def detach(self) -> None:
        """Leave the model as it was. Doing it twice does nothing."""
        model = self._model()
        for hook in self._hooks:
            hook.remove()
        if model is not None and _attached.get(model) is self:
            del _attached[model]
            _restore(model, self._before)

    def _begin(
        self, decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Hooked | None:
        """Decoder pre-hook: tell the cache what is coming, which may choose a part of it."""
        cache = cache_in(kwargs)
        if not isinstance(cache, Cache) or cache.session.probing:
            return None
        model = self._model()
        if model is None or cache.model is not model:
            raise CacheError(
                "this cache was made for another model; make one with kvtrim.Cache(model, ...)"
            )
        if args:
            names = inspect.signature(type(decoder).forward).parameters
            kwargs = {**dict(zip([*names][1:], args, strict=False)), **kwargs}
        ids = kwargs.get("input_ids")
        embeds = ids if ids is not None else kwargs["inputs_embeds"]
        mask = kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
            raise UsageError("a kvtrim cache needs the 2-D attention mask [batch, tokens] or none")
        cache.begin_pass(embeds.shape[0], embeds.shape[1], mask, ids)
        captured = isinstance(cache.session.steps, Steps)  # which know their tokens' positions
        return None if captured else restarted(model, cache, kwargs)

    def _end(
        self, decoder: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        """Decoder post-hook: every layer has attended; a probe is read right after the prompt."""
        left_block()
        cache = cache_in(kwargs)
        if isinstance(cache, Cache):
            probing = cache.session.probing
            cache.end_pass()
            if cache.session.probe_due and not probing:
                probe(decoder, cache)


def _narrow(
    number: int, block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Hooked | None:
    """Decoder layer pre-hook: hand it the part of the prompt that goes on to it."""
    return narrowed(number, args, kwargs)


def _hand_over(
    number: int,
    output: OutputProjection,
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Attention pre-hook: put what the layer needs of the cache among the keywords."""
    cache = cache_in(kwargs)
    if not isinstance(cache, Cache):
        return None
    rotate = cache.rotations[number] if cache.rotations else None
    attending = cache.session.steps or cache.session
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return args, {**kwargs, HANDLE: (attending, number, output, rotate, hidden)}


_attached: "WeakKeyDictionary[PreTrainedModel, Attachment]" = WeakKeyDictionary()


@dataclass(frozen=True)
class Attached:
    """What `attach` returns. Leaving its `with` block detaches, if that very call attached."""

    attachment: Attachment
    first: bool

    def __enter__(self) -> "Attached":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.first:
            self.attachment.detach()


def attach(model: PreTrainedModel, allow_untested: bool = False) -> Attached:
    """Let kvtrim caches work on a model; ordinary caches go on working as before.

    Use it as a call or as a context manager; `with` blocks may be nested.

    Args:
        model: a causal language model of transformers.
        allow_untested: accept an architecture outside `SUPPORTED`.

    Raises:
        UnsupportedModelError: the architecture is untested or cannot be managed.
    """
    first = model not in _attached
    if first:
        _attached[model] = Attachment(model, allow_untested)
    return Attached(_attached[model], first)


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`: the model's attention and hooks are what they were.

    Harmless if not attached.
    """
    if model in _attached:
        _attached[model].detach()


def is_attached(model: PreTrainedModel) -> bool:
    """Whether kvtrim caches work on this model now."""
    return model in _attached


def _implementations(model: PreTrainedModel) -> list[tuple[Any, str | None]]:
    """The attention implementation of every configuration in the model."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    return [(config, config._attn_implementation) for config in configs.values()]


def _restore(model: PreTrainedModel, before: list[tuple[Any, str | None]]) -> None:
    model.set_attn_implementation(before[0][1] or "sdpa")
    for config, name in before:
        config._attn_implementation_internal = name
