"""Saving a cache to a file, and loading it for the same model."""

import json
import os
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from kvtrim.cache import archive as archives
from kvtrim.engine import persist
from kvtrim.errors import CacheError, CacheFileError
from kvtrim.hf import shapes
from kvtrim.hf.cache import Cache
from kvtrim.hf.models import fingerprint
from kvtrim.hf.models.architectures import layout
from kvtrim.methods.keep import Keep
from kvtrim.methods.method import Method
from kvtrim.methods.registry import METHODS
from kvtrim.version import VERSION

_SHOWN = 4  # differences that a message lists


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
        "versions": {
            "kvtrim": VERSION,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "model": fingerprint.complete(model),
        "tokenizer": None if tokenizer is None else fingerprint.of_tokenizer(tokenizer),
        "keep": [cache.keep.kind, cache.keep.amount],
        "prompt": cache.prompt,
        "session": state,
        **_request(cache),
    }
    archives.write(path, tensors, record)


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
    archive = archives.opened(path)
    record = archive.record
    _require_fields(path, record)
    _require_same(path, record, model, tokenizer)
    cache = Cache(
        model,
        _method(path, record["method"], method),
        _keep(path, record["keep"]),
        prompt_tokens=record["session"].get("prompt_tokens"),
        **{name: _tuples(value) for name, value in record["settings"].items()},
    )
    cache.request = (record["method"] if method is None else method, record["settings"])
    strange = shapes.strange(cache, archive.shapes, record["session"])
    if strange:
        raise CacheFileError(f"{path} holds what no cache of this model does: {strange}")
    tensors = archive.read()
    devices = [next(layout(model, True).attention[i].parameters()).device for i in cache.managed]
    persist.restore(cache.session, tensors, record["session"], devices)
    cache.token_ids = _token_ids(path, tensors.get("token_ids"), cache)
    cache.prompt = record["prompt"]
    for index, layer in enumerate(cache.stock_layers()):
        keys, values = (
            tensors[f"sliding.{index}.{name}"].to(model.device) for name in ("keys", "values")
        )
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values, layer.cumulative_length = keys, values, cache.seen
    return cache


def _require_fields(path: str | os.PathLike[str], record: dict[str, Any]) -> None:
    """Refuse a record whose parts are not what `save` writes."""
    kinds = {
        **dict.fromkeys(("model", "session", "settings", "prompt", "versions"), dict),
        "method": str,
        "keep": list,
    }
    prompt = record.get("prompt")
    for name, kind in kinds.items():
        if not isinstance(record.get(name), kind):
            raise CacheFileError(
                f"{path} has no {name} in its record; compress the document again"
            )
    allowed = {"chat": (bool, type(None)), "system": (str, type(None))}
    for name, value in (prompt or {}).items():
        if not isinstance(value, allowed.get(name, ())):
            raise CacheFileError(f"{path} says how its prompt was built in a way nobody writes")


def _keep(path: str | os.PathLike[str], given: list[Any]) -> Keep:
    try:
        kind, amount = given
        whole = {"tokens": str(int(amount)), "share": float(amount), "bytes": f"{int(amount)}B"}
        asked = Keep.parse(whole[kind])
        return Keep(asked.kind, float(amount))
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise CacheFileError(f"{path} holds the budget {given!r}, which is none") from error


def _method(path: str | os.PathLike[str], named: str, given: str | Method | None) -> str | Method:
    """The method to go on with: a name of kvtrim's own, or what the caller names.

    Raises:
        CacheFileError: it takes the caller to name it, or the caller names another.
    """
    if isinstance(given, Method):
        return given
    if given is not None and given != named:
        raise CacheFileError(f"{path} was made with the method {named!r}, not {given!r}")
    if given is None and named not in METHODS:
        raise CacheFileError(
            f"{path} was made with the method {named!r}, which does not come with kvtrim, and a "
            f"file does not decide what is imported: pass method={named!r} to load_cache "
            f"(--method {named})"
        )
    return named


def _token_ids(
    path: str | os.PathLike[str], ids: torch.Tensor | None, cache: Cache
) -> torch.Tensor | None:
    if ids is None or cache.model is None:
        return None
    embeddings: Any = cache.model.get_input_embeddings()
    words = embeddings.weight.shape[0]
    fits = ids.dtype == torch.int64 and list(ids.shape) == [
        len(cache.session.state.reading.lengths),
        cache.seen,
    ]
    if not fits or int(ids.min()) < 0 or int(ids.max()) >= words:
        raise CacheFileError(f"{path} holds tokens that are none of this model's")
    return ids.to(cache.model.device)


def _require_same(
    path: str | os.PathLike[str], record: dict[str, Any], model: PreTrainedModel, tokenizer: Any
) -> None:
    library = record["versions"].get("transformers")
    found = fingerprint.differences(
        record["model"], fingerprint.complete(model), library == transformers.__version__
    )
    if found:
        shown = "; ".join(found[:_SHOWN])
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise CacheFileError(f"{path} was made with another model: {shown}{more}")
    if tokenizer is not None and record.get("tokenizer") not in (
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
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
