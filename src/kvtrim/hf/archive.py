"""A cache in a file: what is written of it, and what is believed of it when it is read."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from kvtrim.cache import archive as archives
from kvtrim.engine import persist
from kvtrim.engine.session import Session
from kvtrim.errors import CacheError, CacheFileError
from kvtrim.hf import shapes
from kvtrim.hf.models import fingerprint
from kvtrim.hf.models.architectures import layout
from kvtrim.methods.keep import Keep
from kvtrim.methods.method import Method
from kvtrim.methods.registry import METHODS
from kvtrim.methods.request import Request
from kvtrim.prompts import Template
from kvtrim.types import Float, Int, Tensor
from kvtrim.version import VERSION

_SHOWN = 4  # differences that a message lists


@dataclass(frozen=True)
class Made:
    """What a file holds of a cache beside its session."""

    request: Request
    template: Template | None
    token_ids: Int[Tensor, "B seen"] | None
    sliding: Sequence[tuple[Float[Tensor, "B K S D"], Float[Tensor, "B K S D"]]]


def write(
    path: str | os.PathLike[str],
    model: PreTrainedModel,
    session: Session,
    made: Made,
    tokenizer: Any = None,
) -> None:
    """Write all that a cache needs to go on: entries, positions, tokens, method, fingerprint.

    Args:
        path: the file; replaced only when the new one is complete.
        session: one that has read at least a prompt.
        tokenizer: if given, its fingerprint is stored too and checked on loading.

    Raises:
        CacheError: there is nothing to save, or the method cannot be named in a file.
        CacheFileError: the file cannot be written.
    """
    tensors, state = persist.export(session)
    for index, (keys, values) in enumerate(made.sliding):
        tensors |= {f"sliding.{index}.keys": keys, f"sliding.{index}.values": values}
    if made.token_ids is not None:
        tensors["token_ids"] = made.token_ids
    template, keep = made.template, made.request.keep
    record = {
        "versions": {
            "kvtrim": VERSION,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "model": fingerprint.complete(model),
        "tokenizer": None if tokenizer is None else fingerprint.of_tokenizer(tokenizer),
        "keep": [keep.kind, keep.amount],
        "prompt": {} if template is None else vars(template),
        "session": state,
        **_words(made.request),
    }
    archives.write(path, tensors, record)


@dataclass(frozen=True)
class Saved:
    """A file whose record is that of a cache of this model; its tensors are yet to be read."""

    path: str | os.PathLike[str]
    archive: archives.Archive
    request: Request
    template: Template | None

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        model: PreTrainedModel,
        tokenizer: Any,
        method: str | Method | None,
    ) -> "Saved":
        """Args and errors as `kvtrim.load_cache`."""
        archive = archives.open_archive(path)
        record = archive.record
        _require_fields(path, record)
        _require_same(path, record, model, tokenizer)
        settings = {name: _tuples(value) for name, value in record["settings"].items()}
        named, keep = _method(path, record["method"], method), _keep(path, record["keep"])
        request = Request.of(named, keep, settings)
        template = Template(**record["prompt"]) if record["prompt"] else None
        return cls(path, archive, request, template)

    @property
    def prompt_tokens(self) -> int | None:
        """Columns of the prompt, if it came in several passes."""
        return self.archive.record["session"].get("prompt_tokens")

    def restore(
        self, session: Session, model: PreTrainedModel, managed: list[int], sliding: int
    ) -> Made:
        """Bring a new session of this request into the saved state.

        Args:
            managed: the layers that it holds.
            sliding: how many layers slide.

        Raises:
            CacheFileError: the file holds what no cache of this model and method does.
        """
        record = self.archive.record["session"]
        strange = shapes.strange(
            shapes.Kind(model.config, session.method, len(managed), sliding),
            self.archive.shapes,
            record,
        )
        if strange:
            raise CacheFileError(f"{self.path} holds what no cache of this model does: {strange}")
        tensors = self.archive.read()
        devices = [next(layout(model, True).attention[i].parameters()).device for i in managed]
        persist.restore(session, tensors, record, devices)
        ids = _token_ids(self.path, tensors.get("token_ids"), model, session)
        keys, values = (
            [tensors[f"sliding.{n}.{name}"].to(model.device) for n in range(sliding)]
            for name in ("keys", "values")
        )
        slides = list(zip(keys, values, strict=True))
        return Made(self.request, self.template, ids, slides)


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
    path: str | os.PathLike[str], ids: Tensor | None, model: PreTrainedModel, session: Session
) -> Tensor | None:
    if ids is None:
        return None
    embeddings: Any = model.get_input_embeddings()
    words = embeddings.weight.shape[0]
    fits = ids.dtype == torch.int64 and list(ids.shape) == [
        len(session.state.reading.lengths),
        session.seen,
    ]
    if not fits or int(ids.min()) < 0 or int(ids.max()) >= words:
        raise CacheFileError(f"{path} holds tokens that are none of this model's")
    return ids.to(model.device)


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


def _words(request: Request) -> dict[str, Any]:
    """The method as it was asked for, if a file can say it."""
    try:
        return json.loads(json.dumps({"method": request.named, "settings": request.settings}))
    except TypeError:
        raise CacheError(
            "this cache's method was built from Python objects, which a file cannot name; "
            "pass a name of kvtrim.METHODS or 'module:ATTRIBUTE', "
            "and parameters as numbers and texts"
        ) from None


def _tuples(value: Any) -> Any:
    """JSON has lists only; parameters are tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
