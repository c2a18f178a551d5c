"""Attaching to a model: attention by name, hooks that find the cache; detaching undoes all.

A model may be used from several threads, and whoever uses it attaches for as long as that takes.
So attachments are counted, and nothing about a pass lives on a module that all passes share.

A hook that comes or goes while another thread is in a pass may be called once without keywords,
which torch looks up apart. That is a pass of somebody who is not attached: nothing is to be done.
"""

import copy
import inspect
import sys
import threading
from functools import partial
from typing import Any, NoReturn, cast

import torch
from transformers import GenerationMixin, PreTrainedModel

from kvtrim.errors import CacheError, UsageError
from kvtrim.hf.attention import HANDLE, NAME, Handle, Mask, managing, padding, register, stock
from kvtrim.hf.base import BaseCache, Coming, cache_in
from kvtrim.hf.cache import Cache
from kvtrim.hf.layers import Handed
from kvtrim.hf.models.architectures import Layout, OutputProjection, layout
from kvtrim.hf.outer import embedded_ids, enter
from kvtrim.hf.probe import probe
from kvtrim.hf.propagation import (
    Hooked,
    PartOfMLP,
    active_filter,
    is_filtering,
    left_block,
    narrow_layer,
    restart,
)

_changing = threading.RLock()


class Attachment:
    """kvtrim on one decoder, for as long as one of those who asked for it needs it."""

    def __init__(self, model: PreTrainedModel, parts: Layout):
        self.layout = parts
        self.open: list[Attached] = []
        self._configs = _configs(model)
        register()
        for config in self._configs:
            stock.take(config)
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
        managed = self.layout.managed
        slide = [n for n in range(len(self.layout.blocks)) if n not in set(managed)]
        for layers, slides in ((managed, False), (slide, True)):
            for number, layer in enumerate(layers):
                module = self.layout.attention[layer]
                output = OutputProjection(module, self.layout.query_heads)
                hand_over = partial(_hand_over, number, output, slides)
                self._hooks.append(module.register_forward_pre_hook(hand_over, with_kwargs=True))
        for module in self.layout.around:
            self._hooks.append(module.register_forward_pre_hook(_enter, with_kwargs=True))

    def release(self, one: "Attached") -> None:
        """One of those who asked needs it no more; with the last the model is as it was."""
        self.open.remove(one)
        if self.open:
            return
        for hook in self._hooks:
            hook.remove()
        for config in self._configs:
            stock.give_back(config)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Attachment":
        """A copy of an attached model, hooks included, is attached: one `detach` undoes it."""
        other = memo[id(self)] = object.__new__(type(self))
        with _changing:
            copied = {name: copy.deepcopy(each, memo) for name, each in vars(self).items()}
            vars(other).update(copied, open=[])
            other.open = [Attached(other)]
            for mine, theirs in zip(self._configs, other._configs, strict=True):
                if theirs is not mine:
                    stock.take(theirs, like=mine)
        return other

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UsageError(
            "a model cannot be pickled while kvtrim is attached to it; call kvtrim.detach(model) "
            "first, and kvtrim.attach on what is loaded (copy.deepcopy works as it is)"
        )

    def _begin(
        self, decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> Hooked | None:
        """Decoder pre-hook: tell the cache what is coming, which may choose a part of it."""
        if kwargs is None:
            return None
        managing.cache = is_filtering()
        kwargs = _by_name(decoder, args, kwargs)
        cache = cache_in(kwargs)
        if not isinstance(cache, BaseCache):
            return None
        if cache.decoder is not decoder:
            raise CacheError(
                "this cache was made for another model; make one with kvtrim.Cache(model, ...)"
            )
        _require_implementation(self.layout.attention[self.layout.managed[0]])
        if cache.take_announcement():
            managing.cache = True
            return None
        asked = kwargs.get("output_attentions")
        if getattr(decoder.config, "output_attentions", False) if asked is None else asked:
            raise UsageError(
                "a kvtrim cache has no attention weights to hand out; leave out "
                "output_attentions, or use an ordinary cache and attn_implementation='eager'"
            )
        ids = kwargs.get("input_ids")
        rows, columns = (ids if ids is not None else kwargs["inputs_embeds"]).shape[:2]
        mask, first = padding(kwargs.get("attention_mask")), cache.seen == 0
        cache.rope.enter(_ends(cache, kwargs, columns), [] if first else cache.ends)
        ids = embedded_ids(cache) if ids is None else ids
        prompt = _in_chunks() if first else None
        cache.begin_pass(Coming(rows, columns, mask, ids, prompt))
        given = {**kwargs, "attention_mask": mask}
        part = None if cache.counts_steps else restart(self.layout, cache, given)
        if part is not None and first:
            cache.rope.enter(_ends(cache, part[1], 0), [])
        managing.cache = True
        single = isinstance(kwargs.get("attention_mask"), Mask)  # a decoder takes none or several
        return ((), given) if part is None and single else part

    def _end(
        self, decoder: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any = None
    ) -> None:
        """Decoder post-hook: every layer has attended; a probe is read right after the prompt."""
        if not isinstance(kwargs, dict):
            return
        left_block()
        managing.cache = False
        cache = cache_in(_by_name(decoder, args, kwargs))
        if isinstance(cache, BaseCache):
            if cache.end_pass() and isinstance(cache, Cache):
                probe(decoder, cache)


def _by_name(
    decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """All arguments of a decoder by their names."""
    if not args:
        return kwargs
    names = inspect.signature(type(decoder).forward).parameters
    return {**dict(zip([*names][1:], args, strict=False)), **kwargs}


def _enter(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> None:
    """Pre-hook of what stands around the decoder: see what is coming, refuse what is no text."""
    if kwargs is not None:
        enter(_by_name(module, args, kwargs))


def _ends(cache: BaseCache, kwargs: dict[str, Any], columns: int) -> list[int]:
    """Where each prompt's new tokens end, as the rotary embedding sees it."""
    if cache.rope.switch is None:
        return []
    at = kwargs.get("position_ids")
    if at is None:
        return [cache.seen + columns - by for by in cache.closed_up or [0]]
    ups = torch.tensor(cache.closed_up or [0]) if columns else 0
    return (at.amax(dim=-1).cpu() + 1 - ups).tolist()


def _in_chunks() -> int | None:
    """Tokens of the prompt that transformers' `generate` is reading in chunks, if it is.

    A chunk does not say that more are coming; only the caller knows.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is cast(Any, GenerationMixin)._prefill.__code__:
            chunk = frame.f_locals["generation_config"].prefill_chunk_size
            tokens = frame.f_locals["input_ids"].shape[1]
            return tokens if chunk is not None and tokens > chunk else None
        frame = frame.f_back
    return None


def _narrow(
    number: int,
    block: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
) -> Hooked | None:
    """Decoder layer pre-hook: hand it the part of the prompt that goes on to it."""
    return None if kwargs is None else narrow_layer(number, args, kwargs)


def _hand_over(
    number: int,
    output: OutputProjection,
    slides: bool,
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
) -> Hooked | None:
    """Attention pre-hook: put what the layer needs of the cache among the keywords.

    Args:
        number: the layer's among the managed ones, or among those that slide.
    """
    if kwargs is None:
        return None
    cache, rotate, handed = cache_in(kwargs), None, {}
    if isinstance(cache, BaseCache):
        attending = cache.windows if slides else cache.attends
    else:
        attending = None if slides else active_filter(number, cache)
    if attending is None:
        return None
    if isinstance(cache, BaseCache):
        _require_implementation(module)
        rotate = cache.rotations[number] if cache.rotations and not slides else None
        handed = {name: Handed(cache) for name, given in kwargs.items() if given is cache}
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    handle = Handle(attending, number, output, rotate, hidden)
    return args, {**kwargs, **handed, HANDLE: handle}


def _require_implementation(module: torch.nn.Module) -> None:
    """Refuse a model whose attention was changed while kvtrim was attached to it."""
    now = getattr(getattr(module, "config", None), "_attn_implementation", NAME)
    if now != NAME:
        raise CacheError(
            f"the model's attention implementation was changed to {now!r} while kvtrim was "
            "attached, so a kvtrim cache cannot work on it; call kvtrim.detach(model), set the "
            "implementation, and attach again"
        )


class Attached:
    """What `attach` returns. Leaving its `with` block takes this one attachment back."""

    def __init__(self, attachment: Attachment):
        self.attachment, self.thread, self.block = attachment, threading.get_ident(), False

    def __enter__(self) -> "Attached":
        self.block = True
        return self

    def __exit__(self, *exception: object) -> None:
        with _changing:
            if self in self.attachment.open:  # else taken back by `detach`
                self.attachment.release(self)


def attach(model: PreTrainedModel, allow_untested: bool = False) -> Attached:
    """Let kvtrim caches work on a model; ordinary caches go on working as before.

    Use it as a call or as a context manager, in as many threads and as often as needed: the model
    is as it was when every `with` block has ended and every call is undone by `detach`. A deep
    copy of an attached model is attached too.

    Args:
        model: a causal language model of transformers.
        allow_untested: accept an architecture that the test suite does not prove.

    Raises:
        UnsupportedModelError: the architecture is untested or cannot be managed.
    """
    with _changing:
        attachment = attachment_of(model)
        if attachment is None:
            attachment = Attachment(model, layout(model, allow_untested))
        one = Attached(attachment)
        attachment.open.append(one)
        return one


def detach(model: PreTrainedModel) -> None:
    """Undo one `attach`: with the last, the model's attention and hooks are what they were.

    Harmless if not attached. The `with` blocks of other threads are left alone.
    """
    with _changing:
        attachment, me = attachment_of(model), threading.get_ident()
        newest = [] if attachment is None else attachment.open[::-1]
        mine = [one for one in newest if one.thread == me]
        for one in (mine or [one for one in newest if not one.block])[:1]:
            one.attachment.release(one)


def attachment_of(model: PreTrainedModel) -> Attachment | None:
    """What is attached to a model, or to another one with the same decoder."""
    hooks = model.get_decoder()._forward_pre_hooks.values()
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return next((owner for owner in owners if isinstance(owner, Attachment)), None)


def _configs(model: PreTrainedModel) -> list[Any]:
    """Every configuration in the model."""
    found = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    return list(found.values())
