"""What stands in a transformers cache for a layer that a session holds."""

from typing import Any

from transformers.cache_utils import CacheLayerMixin

from kvtrim.engine.session import Session
from kvtrim.errors import NotAttachedError
from kvtrim.types import Tensor


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
