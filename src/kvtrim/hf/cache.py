"""The cache of one batch of prompts: its length is what was read, its content is what stays."""

import copy
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedModel

from kvtrim.engine.cuts import Known
from kvtrim.engine.layer import Attends, Call
from kvtrim.engine.propagation import Narrowing
from kvtrim.engine.session import Session
from kvtrim.engine.state import Mark as SessionMark
from kvtrim.errors import CacheError, UsageError
from kvtrim.hf import archive
from kvtrim.hf.base import BaseCache, Coming
from kvtrim.hf.layers import SPARE, ManagedLayer, WindowLayer
from kvtrim.hf.models import fingerprint
from kvtrim.hf.models.architectures import layout, require_managed
from kvtrim.hf.rotary import LongRope, rotations
from kvtrim.methods import auto
from kvtrim.methods.keep import Keep
from kvtrim.methods.method import Method
from kvtrim.methods.ranges import Some, check_arguments
from kvtrim.methods.request import Request
from kvtrim.prompts import Template, Words, frame, repeat_words
from kvtrim.prompts.spans import Given, have_question, per_prompt
from kvtrim.types import Int, Target, Tensor


class Cache(BaseCache):
    """A small KV cache for `model(...)` and `model.generate(...)` on an attached model.

    Args:
        model: the model it will be used with.
        method: a name of `kvtrim.METHODS`, `module:ATTRIBUTE`, or a `Method`; or a `Request`,
            which brings budget and settings along.
        keep: entries per KV head on average, window and sinks included: tokens (512), a share of
            the prompt (0.25, "25%") or bytes of the whole cache ("256MiB").
        prompt_tokens: length of the prompt if it is fed in several passes, so that the cache
            knows when it is complete; by default the first pass is the whole prompt.
        impl: attention over the store: "auto" (triton on CUDA for a few new tokens, else sdpa),
            "sdpa", "triton", "varlen" (torch's FlashAttention, CUDA halves) or "reference" (slow).
            A prompt that is read at once goes through sdpa in any case but the last.
        tokenizer: for methods that probe their prompt in words (kvzip); without it the prompt's
            own tokens are the whole probe.
        spans: named parts of the prompt in tokens, padding not counted: for each name its units,
            a unit being one range (start, end) or a list of them (`{"shots": [(0, 40), ...]}`).
            One mapping for all prompts of the batch, or a list with one for each.
        words: what a `tokenizer` would be asked for, by whoever has it already.
        template: how the prompt was framed, for questions that are asked later.
        tap: told of every layer's number and call, to record what the model hands over.
        settings: parameters of the method, and `preset`.

    Raises:
        UnknownNameError: no such method, preset or parameter.
        BudgetError: a `keep` out of range, or below what the method always keeps.
        UsageError: a method that needs a table of this model's heads, and none was given; or spans
            that overlap or are no ranges.
        UnsupportedModelError: the model's layers cannot be managed, or some of them slide and the
            method lets deeper layers read a part of the prompt.
    """

    @check_arguments
    def __init__(
        self,
        model: PreTrainedModel,
        method: str | Method | Request = "auto",
        keep: int | float | str | Keep = 512,
        *,
        prompt_tokens: Some | None = None,
        impl: str = "auto",
        tokenizer: Any = None,
        spans: Given | Sequence[Given] | None = None,
        words: Words | None = None,
        template: Template | None = None,
        tap: Callable[[int, Call], object] | None = None,
        **settings: Any,
    ):
        if not isinstance(model, PreTrainedModel):
            raise UsageError(
                f"kvtrim.Cache takes the model it will be used with first, got {model!r:.60}; "
                'write kvtrim.Cache(model, "snapkv", keep=512)'
            )
        request = Request.of(method, keep, settings)
        if request.method.schedule.chunks and prompt_tokens is None:
            raise UsageError(
                "chunks=true has to know where the prompt ends: pass prompt_tokens=LENGTH"
            )
        self.managed = layout(model, allow_untested=True).managed
        if request.method.propagation.narrows:
            require_managed(model, self.managed)
        named = per_prompt(spans)
        aware = have_question(named)
        target = _target(model, len(self.managed))
        chosen, self.choice = auto.resolve(request.method, target, aware)
        if self.choice is not None:
            own = {"named": self.choice.name, "settings": self.choice.settings}
            request = replace(request, **own)
        self.request = request
        turns = chosen.refit.changes and not chosen.policy.probes
        turns |= chosen.policy.turns or chosen.positions == "rolled"
        self.rotations = rotations(model) if turns else []
        self.session = Session(
            chosen, request.keep, len(self.managed), prompt_tokens, impl, spans, tap
        )
        if words is None and tokenizer is not None:
            words = repeat_words(tokenizer, frame(tokenizer))
        self.words = words or Words()
        self.template = template
        self._told = False  # what is held beyond the budget is said once
        self.token_ids: Int[Tensor, "B seen"] | None = None  # None too if embeddings were fed
        stock: list[Any] = DynamicCache(config=model.config).layers
        own = set(self.managed)
        layers = [
            ManagedLayer(self.session) if i in own else WindowLayer(layer.sliding_window)
            for i, layer in enumerate(stock)
        ]
        super().__init__(model, LongRope.of(model), layers)

    @property
    def method(self) -> Method:
        """The method with its parameters."""
        return self.session.method

    @property
    def keep(self) -> Keep:
        """The budget asked for."""
        return self.session.keep

    @property
    def seen(self) -> int:
        """Tokens read, padding included: what transformers calls the length of a cache."""
        return self.session.seen

    @property
    def lengths(self) -> list[int]:
        return self.session.state.reading.lengths

    @property
    def closed_up(self) -> list[int]:
        return self.session.state.closed_up

    # What is held

    @property
    def held_bytes(self) -> int:
        """Bytes held, measured: K, V, positions, slack for appends, sliding layers."""
        return self.session.state.held_bytes + sum(x.nbytes for x in self.stock_layers())

    @property
    def full_bytes(self) -> int:
        """Bytes that transformers' full cache would hold for the same tokens."""
        return self.session.state.full_bytes + sum(x.full_bytes for x in self.stock_layers())

    def entries(self) -> list[Int[Tensor, "B K"]]:
        """Entries every head holds now, for each layer; empty before the first pass."""
        stores, layers = iter(self.session.state.stores()), cast(list[Any], self.layers)
        return [
            next(stores).length
            if isinstance(layer, ManagedLayer)
            else torch.full(layer.keys.shape[:2], layer.entries)
            for layer in (layers if self.seen else [])
        ]

    @property
    def remark(self) -> str | None:
        """What auto became and why; what is held, where that is clearly not what was asked for."""
        own = None if self.choice is None else f"auto is {self.choice.label}: {self.choice.why}"
        return "; ".join(filter(None, [own, self.session.remark])) or None

    def save(self, path: str | os.PathLike[str], tokenizer: Any = None) -> None:
        """Write everything to a file for `kvtrim.load_cache`; see `kvtrim.hf.archive.write`."""
        if self.model is None:
            raise CacheError(
                "the model of this cache is gone, so its fingerprint cannot be stored"
            )
        sliding = [(layer.keys, layer.values) for layer in self.stock_layers()]
        made = archive.Made(self.request, self.template, self.token_ids, sliding)
        archive.write(path, self.model, self.session, made, tokenizer)

    def expect(self, tokens: int) -> None:
        self.session.state.expected = tokens

    # A pass over the model

    def take_announcement(self) -> bool:
        return self.session.take_announcement()

    def begin_pass(self, coming: Coming, known: Known | None = None) -> None:
        """New tokens are coming. Raises as `Session.begin`.

        Args:
            known: what an equal pass under the same policy came to.
        """
        if self.session.lent:
            return
        first = self.seen == 0
        if first:
            self.session.state.prompt_tokens = coming.prompt_tokens
        self.session.begin(coming.rows, coming.columns, coming.mask, known)
        if coming.ids is None or not (first or self.token_ids is not None):
            self.token_ids = None
        else:
            before = [] if self.token_ids is None or first else [self.token_ids]
            self.token_ids = torch.cat([*before, coming.ids], dim=1)

    def end_pass(self) -> bool:
        if self.session.lent:
            return False
        probing = self.session.probing
        self.session.end()
        said = self.session.overfed
        if said is not None and not self._told:
            self._told = True
            warnings.warn(said, stacklevel=2)
        return self.session.probe_due and not probing

    @property
    def attends(self) -> Attends:
        return self.session.attends

    @property
    def counts_steps(self) -> bool:
        return self.session.lent

    @property
    def restarts(self) -> bool:
        return self.method.propagation.restarts

    @property
    def narrowing(self) -> Narrowing | None:
        return self.session.narrowing

    @property
    def filter_layer(self) -> int | None:
        return self.session.filter_layer

    def restart(self, index: int, call: Call) -> Narrowing | None:
        return self.session.restart(index, call)

    # Going back

    def mark(self) -> "Mark":
        """Remember this state, for `rewind`.

        Costs next to nothing unless the method evicts later on.
        """
        return Mark(
            self.session.mark(), self.token_ids, [dict(vars(x)) for x in self.stock_layers()]
        )

    def rewind(self, mark: "Mark") -> None:
        """Return to a marked state, also after an interrupted pass."""
        self.session.rewind(mark.session)
        self.token_ids = mark.token_ids
        for layer, state in zip(self.stock_layers(), mark.sliding, strict=True):
            vars(layer).update(state)

    def require_croppable(self, count: int) -> None:
        self.session.require_croppable(count)
        if count < self.seen and not all(layer.can_crop(count) for layer in self.stock_layers()):
            raise CacheError(
                f"cannot take back {count} tokens: layers that slide hold {SPARE} tokens beyond "
                "their window. Copy the cache before, or take a mark and rewind to it"
            )

    def take_back(self, count: int) -> None:
        self.session.crop(count)
        for layer in self.stock_layers():
            layer.crop(-count)
        if count and self.token_ids is not None:
            self.token_ids = self.token_ids[:, :-count]

    def reset(self) -> None:
        """Forget everything that was read."""
        self.session.reset()
        self.token_ids = None
        for layer in self.stock_layers():
            layer.reset()

    def copy(self) -> "Cache":
        """An independent cache in the same state."""
        other = object.__new__(Cache)
        vars(other).update(vars(self))
        other.session, other.rope = self.session.copy(), copy.copy(self.rope)
        other.layers = [
            ManagedLayer(other.session) if isinstance(layer, ManagedLayer) else copy.copy(layer)
            for layer in self.layers
        ]
        return other

    def copy_stock(self, other: "Cache") -> "Cache":
        """Give another cache of the same model this one's sliding layers; returns the other."""
        for mine, theirs in zip(self.stock_layers(), other.stock_layers(), strict=True):
            vars(theirs).update(vars(mine))
        return other

    def select_rows(self, rows: Int[Tensor, " R"]) -> None:
        self.session.state.select_rows(rows)
        if self.token_ids is not None:
            self.token_ids = self.token_ids[rows.to(self.token_ids.device)]


@dataclass(frozen=True)
class Mark:
    """A state of a cache to come back to."""

    session: SessionMark
    token_ids: Int[Tensor, "B seen"] | None
    sliding: list[dict[str, Any]]


def load_cache(
    path: str | os.PathLike[str],
    model: PreTrainedModel,
    tokenizer: Any = None,
    method: str | Method | None = None,
) -> Cache:
    """A saved cache, for the model that filled it.

    Args:
        path: the file.
        model: with exactly the weights and the configuration of the model that filled it.
        tokenizer: if given, and one was given to `save`, it must be the same.
        method: needed where a method of your own made the cache: the same `module:NAME`, or the
            `Method`. A file never decides what is imported.

    Raises:
        CacheFileError: no such file; truncated, altered or inconsistent; of another model, number
            format, RoPE, tokenizer or method; or of another version of the format.
    """
    saved = archive.Saved.open(path, model, tokenizer, method)
    cache = Cache(model, saved.request, prompt_tokens=saved.prompt_tokens, template=saved.template)
    made = saved.restore(cache.session, model, cache.managed, len(cache.stock_layers()))
    cache.token_ids = made.token_ids
    for layer, (keys, values) in zip(cache.stock_layers(), made.sliding, strict=True):
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values, layer.cumulative_length = keys, values, cache.seen
    return cache


def _target(model: PreTrainedModel, layers: int) -> Target:
    """What a budget is told of a model of which kvtrim manages so many layers."""
    config = model.config.get_text_config(decoder=True)
    name = model.config.name_or_path or f"this {config.model_type} model"
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return Target(
        name,
        layers,
        heads,
        lambda: fingerprint.identity(model),
        kv_heads,
        width=config.hidden_size,
    )
