"""The layers of a kvtrim cache: those that a session holds, and those that slide."""

from typing import Any, Protocol, runtime_checkable

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from kvtrim.errors import CacheError, NotAttachedError
from kvtrim.types import Tensor


@runtime_checkable
class Read(Protocol):
    """What was read, as layers tell transformers of it."""

    recording: bool
    """`crop` will say which of the new tokens stay."""

    @property
    def seen(self) -> int:
        """Columns read."""
        ...


class ManagedLayer(CacheLayerMixin):
    """Stands for one layer that kvtrim holds, and takes nothing in itself.

    On an attached model the layer's attention is handed `Handed` in the place of the cache, so a
    call to `update` comes from a model that kvtrim is not attached to, at whatever moment.
    Cropping, reordering and resetting concern the cache as a whole and are done by `Cache`.
    """

    is_compileable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, read: Read):
        super().__init__()
        self.read = read

    is_croppable = True

    @property
    def record_past(self) -> bool:
        """Whether `crop` will say which of the new tokens stay."""
        return self.read.recording

    @record_past.setter
    def record_past(self, recording: bool) -> None:
        self.read.recording = recording

    def activate_past_recording(self) -> None:
        """`crop` will say which of the new tokens stay."""
        self.read.recording = True

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
        return self.read.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.read.seen

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


SPARE = 32
"""Tokens that sliding layers hold beyond their window, so that as many can be taken back."""


class WindowLayer(DynamicSlidingWindowLayer):
    """A sliding layer that takes tokens back: it holds a few more than its window."""

    is_croppable = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens; K and V of what they attend to, [B, K, window - 1 + Q, D] at most."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        self.cumulative_length += new
        keys = torch.cat([_some(self.keys), key_states], dim=-2)
        values = torch.cat([_some(self.values), value_states], dim=-2)
        self.keys, self.values = keys, values
        self._trim()
        visible = self.sliding_window - 1 + new
        return keys[:, :, -visible:], values[:, :, -visible:]

    def can_crop(self, count: int) -> bool:
        """Whether so many tokens can be taken back."""
        if not self.is_initialized:
            return True
        needed = min(self.sliding_window - 1, self.cumulative_length - count)
        return 0 <= needed <= _some(self.keys).shape[2] - count

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens; the number is negative, and `can_crop` allows it."""
        if self.is_initialized and tokens_to_remove:
            self.keys = _some(self.keys)[:, :, :tokens_to_remove]
            self.values = _some(self.values)[:, :, :tokens_to_remove]
            self.cumulative_length += tokens_to_remove
        if self.is_initialized:
            self._trim(settled=True)

    @property
    def entries(self) -> int:
        """Tokens of its window that it holds."""
        return min(self.sliding_window - 1, self.cumulative_length)

    def last(self) -> tuple[Tensor, Tensor]:
        """K and V [B, K, entries, D] of the tokens of its window, copied."""
        held = _some(self.keys), _some(self.values)
        keys, values = (each[:, :, each.shape[2] - self.entries :].clone() for each in held)
        return keys, values

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return _some(self.keys).nbytes + _some(self.values).nbytes if self.is_initialized else 0

    @property
    def full_bytes(self) -> int:
        """Bytes that transformers' own layer holds between passes."""
        held = _some(self.keys).shape[2] if self.is_initialized else 0
        return self.nbytes * self.entries // held if held else 0

    def _trim(self, settled: bool = False) -> None:
        """Let go of what neither the window nor `crop` needs."""
        keys, values, most = _some(self.keys), _some(self.values), self.sliding_window - 1 + SPARE
        held = keys.shape[2]
        if held <= most or (self.record_past and not settled):
            return
        keys, values = keys[:, :, -most:], values[:, :, -most:]
        if held > 2 * most:  # a view would hold the whole prompt
            keys, values = keys.clone(), values.clone()
        self.keys, self.values = keys, values


def _some(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise CacheError("this layer has read nothing yet")
    return tensor
