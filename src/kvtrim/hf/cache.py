"""The cache that transformers sees: its length is what was read, its content is what stays."""

import copy
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast
from weakref import ref

import torch
from transformers import Cache as TransformersCache
from transformers import DynamicCache, PreTrainedModel

from kvtrim.engine.session import Session
from kvtrim.engine.state import Mark as SessionMark
from kvtrim.errors import CacheError, UsageError
from kvtrim.hf.layers import SPARE, ManagedLayer, WindowLayer
from kvtrim.hf.models import fingerprint
from kvtrim.hf.models.architectures import layout, require_managed
from kvtrim.hf.rotary import rotations, switch
from kvtrim.methods import auto
from kvtrim.methods.keep import Keep
from kvtrim.methods.method import Method
from kvtrim.methods.ranges import Some, checked
from kvtrim.methods.settings import find
from kvtrim.prompts import Words, frame, repeat_words
from kvtrim.prompts.spans import Given, per_prompt
from kvtrim.types import Int, Tensor


class Cache(TransformersCache):
    """A small KV cache for `model(...)` and `model.generate(...)` on an attached model.

    Args:
        model: the model it will be used with.
        method: a name of `kvtrim.METHODS`, `module:ATTRIBUTE`, or a `Method`.
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
        settings: parameters of the method, and `preset`.

    Raises:
        UnknownNameError: no such method, preset or parameter.
        BudgetError: a `keep` out of range, or below what the method always keeps.
        UsageError: a method that needs a table of this model's heads, and none was given; or spans
            that overlap or are no ranges.
        UnsupportedModelError: the model's layers cannot be managed, or some of them slide and the
            method lets deeper layers read a part of the prompt.
    """

    @checked
    def __init__(
        self,
        model: PreTrainedModel,
        method: str | Method = "auto",
        keep: int | float | str | Keep = 512,
        *,
        prompt_tokens: Some | None = None,
        impl: str = "auto",
        tokenizer: Any = None,
        spans: Given | Sequence[Given] | None = None,
        **settings: Any,
    ):
        if not isinstance(model, PreTrainedModel):
            raise UsageError(
                f"kvtrim.Cache takes the model it will be used with first, got {model!r:.60}; "
                'write kvtrim.Cache(model, "snapkv", keep=512)'
            )
        if not isinstance(method, (str, Method)):
            raise UsageError(
                f"method={method!r:.60} is no name of kvtrim.METHODS and no Method; a budget is "
                'given as keep: kvtrim.Cache(model, "snapkv", keep=512)'
            )
        budget, chosen = Keep.parse(keep), find(method, **settings)
        if chosen.schedule.chunks and prompt_tokens is None:
            raise UsageError(
                "chunks=true has to know where the prompt ends: pass prompt_tokens=LENGTH"
            )
        self.managed = layout(model, allow_untested=True).managed
        if chosen.propagation.narrows:
            require_managed(model, self.managed)
        named = per_prompt(spans)
        aware = not named or any("question" in own for own in named)
        target = fingerprint.target(model, len(self.managed))
        chosen, self.choice = auto.resolved(chosen, target, aware)
        if self.choice is not None:
            method = self.choice.name
        turns = chosen.refit.changes and not chosen.policy.probes
        turns |= chosen.policy.turns or chosen.positions == "rolled"
        self.rotations = rotations(model) if turns else []
        self.session = Session(chosen, budget, len(self.managed), prompt_tokens, impl, spans)
        self.words = Words() if tokenizer is None else repeat_words(tokenizer, frame(tokenizer))
        self.request = (method, settings)  # as asked for, to be saved
        self.prompt: dict[str, Any] = {}  # how the prompt was built, for questions asked later
        self._told = False  # what is held beyond the budget is said once
        self.token_ids: Int[Tensor, "B seen"] | None = None  # None too if embeddings were fed
        self.coming: Int[Tensor, "B n"] | None = None  # of the next pass, if its decoder sees none
        self.switch = switch(model)  # of long RoPE, and on which side of it keys were turned
        self.beyond: bool | None = None
        self._model, self._decoder = ref(model), ref(model.get_decoder())
        stock: list[Any] = DynamicCache(config=model.config).layers
        own = set(self.managed)
        super().__init__(
            layers=[
                ManagedLayer(self.session) if i in own else WindowLayer(layer.sliding_window)
                for i, layer in enumerate(stock)
            ]
        )

    @property
    def model(self) -> PreTrainedModel | None:
        """The model it was made for, while that exists."""
        return self._model()

    @property
    def decoder(self) -> torch.nn.Module | None:
        """The part of that model that reads into it, while that exists."""
        return self._decoder()

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
        return self.session.state.reading.seen

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
        own = None if self.choice is None else f"auto is {self.choice.name}: {self.choice.why}"
        return "; ".join(filter(None, [own, self.session.remark])) or None

    def save(self, path: str | os.PathLike[str], tokenizer: Any = None) -> None:
        """Write everything to a file for `kvtrim.load_cache`; see `kvtrim.hf.saving.save`."""
        from kvtrim.hf.saving import save  # it needs Cache, so it cannot be imported above

        save(self, path, tokenizer)

    def expect(self, tokens: int) -> None:
        """Take so many tokens as handed over, not generated, in whatever passes they come.

        Only methods that treat the two differently need this.
        """
        self.session.state.expected = tokens

    # A pass over the model, called by the hooks of `attach`

    def begin_pass(self, rows: int, columns: int, mask: Tensor | None, ids: Tensor | None) -> None:
        """New tokens are coming. Raises as `Session.begin`."""
        if self.session.steps is not None:
            return
        first = self.seen == 0
        self.session.begin(rows, columns, mask)
        if ids is None or not (first or self.token_ids is not None):
            self.token_ids = None
        else:
            before = [] if self.token_ids is None or first else [self.token_ids]
            self.token_ids = torch.cat([*before, ids], dim=1)

    def __bool__(self) -> bool:
        """False where Phi-3 would throw a true cache away, and read everything again."""
        return self.switch is None

    def end_pass(self) -> None:
        """Every layer has attended."""
        if self.session.steps is None:
            self.session.end()
            said = self.session.overfed
            if said is not None and not self._told:
                self._told = True
                warnings.warn(said, stacklevel=2)

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
        """Raise as `crop(-count)` would, and change nothing."""
        self.session.require_croppable(count)
        if count < self.seen and not all(layer.can_crop(count) for layer in self.stock_layers()):
            raise CacheError(
                f"cannot take back {count} tokens: layers that slide hold {SPARE} tokens beyond "
                "their window. Copy the cache before, or take a mark and rewind to it"
            )

    def crop(self, tokens_to_remove: int | Int[Tensor, ""]) -> None:
        """Take back the newest tokens, as if they had never been read.

        The number is negative, as transformers has it.

        Raises:
            CacheError: that cannot be, because entries were evicted or taken into account since;
                nothing has changed.
        """
        count = -int(tokens_to_remove)
        if count < 0:
            raise UsageError(f"crop({-count}): give the number of tokens to take back as negative")
        self.require_croppable(count)
        if count and count == self.seen:
            self.reset()
            return
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

    def __deepcopy__(self, memo: dict[int, Any]) -> "Cache":
        return self.copy()

    def __copy__(self) -> "Cache":
        return self.copy()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise CacheError(
            "a kvtrim cache cannot be pickled; write it to a file with cache.save(path), read it "
            "with kvtrim.load_cache(path, model), or copy it with cache.copy()"
        )

    def copy(self) -> "Cache":
        """An independent cache in the same state."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.session = self.session.copy()
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

    # Other prompts

    def reorder_cache(self, beam_idx: Any) -> None:
        """Keep these prompts in this order (beam search)."""
        self._select(beam_idx.long())
        for layer in self.stock_layers():
            layer.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these prompts in this order."""
        self._select(indices.long())
        for layer in self.stock_layers():
            layer.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every prompt."""
        rows = len(self.session.state.reading.lengths)
        self._select(torch.arange(rows).repeat_interleave(repeats))
        for layer in self.stock_layers():
            layer.batch_repeat_interleave(repeats)

    def _select(self, rows: Tensor) -> None:
        self.session.state.select_rows(rows)
        if self.token_ids is not None:
            self.token_ids = self.token_ids[rows.to(self.token_ids.device)]

    def stock_layers(self) -> list[Any]:
        """The layers that slide and keep their own rule."""
        return [layer for layer in self.layers if isinstance(layer, WindowLayer)]


@dataclass(frozen=True)
class Mark:
    """A state of a cache to come back to."""

    session: SessionMark
    token_ids: Int[Tensor, "B seen"] | None
    sliding: list[dict[str, Any]]
