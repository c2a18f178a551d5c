"""What transformers, the hooks of `attach` and those who run a model ask of every kvtrim cache."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, NoReturn, cast
from weakref import ref

import torch
from transformers import Cache as TransformersCache
from transformers import GenerationMixin, PreTrainedModel

from kvtrim.engine.layer import Attends, Call
from kvtrim.engine.propagation import Narrowing
from kvtrim.errors import CacheError, UsageError
from kvtrim.hf.layers import WindowLayer
from kvtrim.hf.rotary import LongRope, Rotation
from kvtrim.types import Int, Tensor

_OLD, _NEW = "past_key_values", "cache"

KEYWORD = (
    _NEW
    if _NEW in signature(cast(Any, GenerationMixin).prepare_inputs_for_generation).parameters
    else _OLD
)
"""The name by which transformers takes a cache: `cache` from 5.24 on, whose models take both."""


def cache_keyword(cache: Any) -> dict[str, Any]:
    """The keyword argument that hands a cache, or None, to a model or to `generate`."""
    return {KEYWORD: cache}


def cache_in(keywords: Mapping[str, Any]) -> TransformersCache | None:
    """The cache among the keyword arguments of a model, a decoder, a layer or its attention."""
    cache = keywords.get(KEYWORD)
    return keywords.get(_OLD) if cache is None else cache


@dataclass(frozen=True)
class Coming:
    """A pass over the model that begins."""

    rows: int
    columns: int
    mask: Tensor | None = None  # 2-D, of all columns or of the new ones
    ids: Int[Tensor, "B n"] | None = None  # None where embeddings are fed
    prompt_tokens: int | None = None  # of the prompt that it begins, if more passes bring it


class BaseCache(TransformersCache, ABC):
    """A KV cache of an attached model: its length is what was read, not what is held.

    Final classes say what a pass does to it, and how to go back.
    """

    rotations: Sequence[Rotation] = ()
    """How keys of each managed layer turn, for methods that turn some."""

    def __init__(self, model: PreTrainedModel, rope: LongRope, layers: list[Any]):
        self._model, self._decoder = ref(model), ref(model.get_decoder())
        self.rope = rope
        super().__init__(layers=layers)

    @property
    def model(self) -> PreTrainedModel | None:
        """The model it was made for, while that exists."""
        return self._model()

    @property
    def decoder(self) -> torch.nn.Module | None:
        """The part of that model that reads into it, while that exists."""
        return self._decoder()

    def stock_layers(self) -> list[Any]:
        """The layers that slide and keep their own rule."""
        return [layer for layer in self.layers if isinstance(layer, WindowLayer)]

    # What was read, and what is held of it

    @property
    @abstractmethod
    def seen(self) -> int:
        """Tokens read, padding included: what transformers calls the length of a cache."""

    @property
    @abstractmethod
    def lengths(self) -> list[int]:
        """Each prompt's tokens, padding not counted; empty before the first pass."""

    @property
    @abstractmethod
    def closed_up(self) -> list[int]:
        """How far each prompt's tokens moved up when its model started again on a part of it."""

    @property
    @abstractmethod
    def held_bytes(self) -> int:
        """Bytes held, measured: K, V, positions, slack for appends, sliding layers."""

    @property
    @abstractmethod
    def full_bytes(self) -> int:
        """Bytes that transformers' full cache would hold for the same tokens."""

    @abstractmethod
    def entries(self) -> list[Int[Tensor, "B K"]]:
        """Entries every head holds now, for each layer; empty before the first pass."""

    @abstractmethod
    def expect(self, tokens: int) -> None:
        """Take so many tokens as handed over, not generated, in whatever passes they come.

        Only methods that treat the two differently need this.
        """

    @property
    def ends(self) -> list[int]:
        """Where each prompt's tokens end, as the rotary embedding sees it."""
        ups = self.closed_up or [0] * len(self.lengths)
        return [length - by for length, by in zip(self.lengths, ups, strict=True)]

    @property
    def restarts(self) -> bool:
        """The prompt is read a second time, in part, so that its length changes on the way."""
        return False

    def require_reach(self, first: int, last: int) -> None:
        """Refuse in advance what would begin with `first` tokens and go on to `last`.

        Raises:
            CacheError: long RoPE would change the model's frequencies on the way.
        """
        if self.seen or not self.restarts:
            end = last - max(self.closed_up, default=0)
            self.rope.require_reach(first, end, self.ends if self.seen else [])

    def __bool__(self) -> bool:
        """False where Phi-3 would throw a true cache away, and read everything again."""
        return self.rope.switch is None

    # A pass over the model

    @abstractmethod
    def take_announcement(self) -> bool:
        """Whether the pass that the model begins was begun here already; true once."""

    @abstractmethod
    def begin_pass(self, coming: Coming) -> None:
        """New tokens are coming. Raises as `Session.begin`."""

    @abstractmethod
    def end_pass(self) -> bool:
        """Every layer has attended; whether a probe of what was read is due now."""

    @property
    @abstractmethod
    def attends(self) -> Attends:
        """What stands behind the attention of the managed layers."""

    @property
    def windows(self) -> Attends | None:
        """What stands behind the attention of layers that slide; None: they see to themselves."""
        return None

    @property
    def counts_steps(self) -> bool:
        """Single tokens are appended by something that knows their positions itself."""
        return False

    @property
    def narrowing(self) -> Narrowing | None:
        """What the layers above read of the prompt under way; None if all of it, so far."""
        return None

    @property
    def filter_layer(self) -> int | None:
        """The layer that has to choose which part of the prompt under way is read, if any."""
        return None

    def restart(self, index: int, call: Call) -> Narrowing | None:
        """Choose the part of the prompt that is read, by what its filter layer was handed."""
        raise CacheError("nothing starts again on a part of this prompt")

    # Going back

    @abstractmethod
    def mark(self) -> Any:
        """Remember this state, for `rewind`."""

    @abstractmethod
    def rewind(self, mark: Any) -> None:
        """Return to a marked state, also after an interrupted pass."""

    @abstractmethod
    def require_croppable(self, count: int) -> None:
        """Raise as `crop(-count)` would, and change nothing."""

    @abstractmethod
    def take_back(self, count: int) -> None:
        """Take back the newest tokens, which `require_croppable` allows."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything that was read."""

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
        else:
            self.take_back(count)

    @abstractmethod
    def copy(self) -> "BaseCache":
        """An independent cache in the same state."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "BaseCache":
        return self.copy()

    def __copy__(self) -> "BaseCache":
        return self.copy()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise CacheError(
            "a kvtrim cache cannot be pickled; write it to a file with cache.save(path), read it "
            "with kvtrim.load_cache(path, model), or copy it with cache.copy()"
        )

    # Other prompts

    @abstractmethod
    def select_rows(self, rows: Int[Tensor, " R"]) -> None:
        """Keep these prompts in this order; one may occur several times."""

    def reorder_cache(self, beam_idx: Any) -> None:
        """Keep these prompts in this order (beam search)."""
        self.select_rows(beam_idx.long())
        for layer in self.stock_layers():
            layer.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these prompts in this order."""
        self.select_rows(indices.long())
        for layer in self.stock_layers():
            layer.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every prompt."""
        self.select_rows(torch.arange(len(self.lengths)).repeat_interleave(repeats))
        for layer in self.stock_layers():
            layer.batch_repeat_interleave(repeats)
