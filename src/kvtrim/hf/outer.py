"""What stands around a decoder: the outer modules of a model that reads images as well.

They embed the tokens and make the masks before the decoder is called, so a hook on them tells it
which tokens come and for which kind of cache the masks are. kvtrim reads text alone.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import ref

from kvtrim.errors import UsageError
from kvtrim.hf.attention import managing
from kvtrim.hf.base import BaseCache, cache_in
from kvtrim.types import Tensor

_TEXT = {"input_ids", "attention_mask", "position_ids", "inputs_embeds", "cache_position"}
_TEXT |= {"labels", "logits_to_keep", "cache", "past_key_values"}
_KINDS = {"token_type_ids", "mm_token_type_ids"}  # of each token; 0 is text


class _Embedded(threading.local):
    """The ids of the pass that this thread is in, whose decoder is handed embeddings."""

    cache: "ref[BaseCache] | None" = None
    ids: Tensor | None = None


_embedded = _Embedded()


def embedded_ids(cache: BaseCache) -> Tensor | None:
    """The ids [B, n] that an outer module embeds for the pass at hand over a cache; once."""
    (mine, ids), _embedded.cache, _embedded.ids = (_embedded.cache, _embedded.ids), None, None
    return ids if mine is not None and mine() is cache else None


def enter(kwargs: Mapping[str, Any]) -> None:
    """A pass goes into an outer module, all of its arguments by name.

    Raises:
        UsageError: something else than text would go into a kvtrim cache.
    """
    cache = cache_in(kwargs)
    managing.cache = isinstance(cache, BaseCache)
    if not isinstance(cache, BaseCache):
        return
    other = [name for name, given in kwargs.items() if name not in _TEXT and _says(name, given)]
    if other:
        raise UsageError(
            f"a kvtrim cache reads text alone, and {', '.join(sorted(other))} came with it; leave "
            "the images out, or give the model an ordinary cache for them"
        )
    _embedded.cache, _embedded.ids = ref(cache), kwargs.get("input_ids")


def _says(name: str, given: Any) -> bool:
    if name in _KINDS:
        return given is not None and bool(given.any())
    return (
        isinstance(given, Tensor | Mapping | Sequence)
        and not isinstance(given, str)
        and bool(len(given))
    )
