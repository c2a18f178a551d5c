"""The cache that transformers sees: its length is what was read, its content is what stays."""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast
from weakref import ref

import torch
from transformers import Cache as TransformersCache
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from kvtrim.engine.session import Session
from kvtrim.engine.state import Mark as SessionMark
from kvtrim.errors import CacheError, NotAttachedError, UsageError
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

# What stands in a transformers cache for a layer that a session holds.


class ManagedLayer(CacheLayerMixin):
    """Stands for one layer that the session holds, and takes nothing in itself.

    On an attached model the layer's attention is handed `Handed` in the place of the cache, so a
    call to `update` comes from a model that kvtrim is not attached to, at whatever moment.
    Cropping, reordering and resetting concern the session as a whole and are done by `Cache`.
    """

    is_compileable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, session: Session):
        super().__init__()
        self.session = session

    @property
    def is_croppable(self) -> bool:
        return self.session.method.schedule.every is None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        raise NotAttachedError(
            "a kvtrim cache reached a model that kvtrim is not attached to; call "
            "kvtrim.attach(model) first, or run inside `with kvtrim.attach(model):`"
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.session.state.reading.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.session.state.reading.seen

    def get_max_length(self) -> int:
        return -1


class Handed:
    """A kvtrim cache as one layer's attention meets it: new K and V go through untouched."""

    def __init__(self, cache: Any):
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The attention function will store them."""
        return key_states, value_states


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
        self.rotations = rotations(model) if chosen.positions == "rolled" or turns else []
        self.session = Session(chosen, budget, len(self.managed), prompt_tokens, impl, spans)
        self.words = Words() if tokenizer is None else repeat_words(tokenizer, frame(tokenizer))
        self.request = (method, settings)  # as asked for, to be saved
        self.prompt: dict[str, Any] = {}  # how the prompt was built, for questions asked later
        self.token_ids: Int[Tensor, "B seen"] | None = None  # None too if embeddings were fed
        self.coming: Int[Tensor, "B n"] | None = None  # of the next pass, if its decoder sees none
        self.switch = switch(model)  # of long RoPE, and on which side of it keys were turned
        self.beyond: bool | None = None
        self._model, self._decoder = ref(model), ref(model.get_decoder())
        stock = DynamicCache(config=model.config).layers
        own = set(self.managed)
        super().__init__(
            layers=[ManagedLayer(self.session) if i in own else x for i, x in enumerate(stock)]
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
        return self.session.state.held_bytes + self._sliding_bytes()

    @property
    def full_bytes(self) -> int:
        """Bytes that transformers' full cache would hold for the same tokens."""
        return self.session.state.full_bytes + self._sliding_bytes()

    def entries(self) -> list[Int[Tensor, "B K"]]:
        """Entries every head holds now, for each layer; empty before the first pass."""
        stores, layers = iter(self.session.state.stores()), cast(list[Any], self.layers)
        return [
            next(stores).length
            if isinstance(layer, ManagedLayer)
            else torch.full(layer.keys.shape[:2], layer.keys.shape[2])
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

    def crop(self, tokens_to_remove: int | Int[Tensor, ""]) -> None:
        """Take back the newest tokens; the number is negative, as transformers has it.

        Raises:
            CacheError: entries were evicted since then.
        """
        tokens_to_remove = int(tokens_to_remove)
        if tokens_to_remove > 0:
            raise UsageError(
                f"crop({tokens_to_remove}): give the number of tokens to take back as a negative"
            )
        if tokens_to_remove:
            self.session.state.crop(-tokens_to_remove)
            for layer in self.stock_layers():
                layer.crop(tokens_to_remove)
            if self.token_ids is not None:
                self.token_ids = self.token_ids[:, :tokens_to_remove]

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
        return [layer for layer in self.layers if not isinstance(layer, ManagedLayer)]

    def _sliding_bytes(self) -> int:
        return sum(
            x.keys.nbytes + x.values.nbytes for x in self.stock_layers() if x.is_initialized
        )


@dataclass(frozen=True)
class Mark:
    """A state of a cache to come back to."""

    session: SessionMark
    token_ids: Int[Tensor, "B seen"] | None
    sliding: list[dict[str, Any]]
