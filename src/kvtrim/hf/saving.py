"""Saving a cache to a file, and loading it for the same model."""

import json
import os
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from kvtrim.budgets import Keep
from kvtrim.cache import archive
from kvtrim.engine import persist
from kvtrim.errors import CacheError, CacheFileError
from kvtrim.hf import fingerprint
from kvtrim.hf.architectures import layout
from kvtrim.hf.cache import Cache
from kvtrim.version import VERSION

_FORMAT = 1


def save(cache: Cache, path: str | os.PathLike[str], tokenizer: Any = None) -> None:
    """Write all that a cache needs to go on: entries, positions, tokens, method, fingerprint.

    Args:
        cache: one that has read at least a prompt.
        path: the file; replaced only when the new one is complete.
        tokenizer: if given, its fingerprint is stored too and checked on loading.

    Raises:
        CacheError: there is nothing to save, or the method cannot be named in a file.
        CacheFileError: the file cannot be written.
    """
    model = cache.model
    if model is None:
        raise CacheError("the model of this cache is gone, so its fingerprint cannot be stored")
    tensors, state = persist.export(cache.session)
    for index, layer in enumerate(cache.stock_layers()):
        tensors |= {f"sliding.{index}.keys": layer.keys, f"sliding.{index}.values": layer.values}
    if cache.token_ids is not None:
        tensors["token_ids"] = cache.token_ids
    record = {
        "format": _FORMAT,
        "versions": {
            "kvtrim": VERSION,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "model": fingerprint.of_model(model),
        "tokenizer": None if tokenizer is None else fingerprint.of_tokenizer(tokenizer),
        "keep": [cache.keep.kind, cache.keep.amount],
        "prompt": cache.prompt,
        "session": state,
        **_request(cache),
    }
    archive.write(path, tensors, record)


def load_cache(
    path: str | os.PathLike[str], model: PreTrainedModel, tokenizer: Any = None
) -> Cache:
    """A saved cache, for the model that filled it.

    Raises:
        CacheFileError: no such file; truncated, altered or inconsistent; of another model, number
            format, RoPE or tokenizer; or written by a newer kvtrim.
    """
    tensors, record = archive.read(path)
    if record.get("format") != _FORMAT:
        raise CacheFileError(
            f"{path} has format {record.get('format')}, this kvtrim {VERSION} reads {_FORMAT}; "
            "use the version that wrote it or compress the document again"
        )
    _require_same(path, record, model, tokenizer)
    kind, amount = record["keep"]
    settings = {name: _tuples(value) for name, value in record["settings"].items()}
    prompt = record["session"].get("prompt_tokens")
    cache = Cache(model, record["method"], Keep(kind, amount), prompt_tokens=prompt, **settings)
    devices = [next(layout(model, True).attention[i].parameters()).device for i in cache.managed]
    persist.restore(cache.session, tensors, record["session"], devices)
    ids = tensors.get("token_ids")
    cache.token_ids = None if ids is None else ids.to(model.device)
    cache.prompt = record["prompt"]
    for index, layer in enumerate(cache.stock_layers()):
        keys, values = (
            tensors[f"sliding.{index}.{name}"].to(model.device) for name in ("keys", "values")
        )
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values, layer.cumulative_length = keys, values, cache.seen
    return cache


def _require_same(
    path: str | os.PathLike[str], record: dict[str, Any], model: PreTrainedModel, tokenizer: Any
) -> None:
    found = fingerprint.differences(record["model"], fingerprint.of_model(model))
    if found:
        raise CacheFileError(f"{path} was made with another model: {'; '.join(found)}")
    if tokenizer is not None and record["tokenizer"] not in (
        None,
        fingerprint.of_tokenizer(tokenizer),
    ):
        raise CacheFileError(f"{path} was made with another tokenizer or chat template")


def _request(cache: Cache) -> dict[str, Any]:
    """The method as it was asked for, if a file can say it."""
    method, settings = cache.request
    try:
        return json.loads(json.dumps({"method": method, "settings": settings}))
    except TypeError:
        raise CacheError(
            "this cache's method was built from Python objects, which a file cannot name; "
            "pass a name of kvtrim.METHODS or 'module:ATTRIBUTE', "
            "and parameters as numbers and texts"
        ) from None


def _tuples(value: Any) -> Any:
    """JSON has lists only; parameters are tuples."""
    return tuple(value) if isinstance(value, list) else value
