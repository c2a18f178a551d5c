"""The name by which transformers takes a cache: `past_key_values`, from 5.24 on `cache`."""

from collections.abc import Mapping
from inspect import signature
from typing import Any, cast

from transformers import Cache, GenerationMixin

_OLD, _NEW = "past_key_values", "cache"

KEYWORD = (
    _NEW
    if _NEW in signature(cast(Any, GenerationMixin).prepare_inputs_for_generation).parameters
    else _OLD
)
"""The name in the transformers that is installed. Models of 5.24 still take the old one."""


def cache_keyword(cache: Any) -> dict[str, Any]:
    """The keyword argument that hands a cache, or None, to a model or to `generate`."""
    return {KEYWORD: cache}


def cache_in(keywords: Mapping[str, Any]) -> Cache | None:
    """The cache among the keyword arguments of a model, a decoder, a layer or its attention."""
    cache = keywords.get(KEYWORD)
    return keywords.get(_OLD) if cache is None else cache
