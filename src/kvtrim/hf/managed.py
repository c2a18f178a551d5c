"""What stands in a transformers cache for a layer that a session holds."""

from typing import Any

from transformers.cache_utils import CacheLayerMixin

from kvtrim.engine.session import Session
from kvtrim.errors import NotAttachedError
from kvtrim.types import Tensor


class ManagedLayer(CacheLayerMixin):
    """Stands for one layer that the session holds; hands new K and V through untouched.

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
        if not self.session.under_way:
            raise NotAttachedError(
                "a kvtrim cache reached a model that kvtrim is not attached to; call "
                "kvtrim.attach(model) first, or run inside `with kvtrim.attach(model):`"
            )
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.session.state.reading.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.session.state.reading.seen

    def get_max_length(self) -> int:
        return -1
