"""Documents of a library read by a model: compressed and kept, found again, checked, loaded."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtrim.api import compress
from kvtrim.cache import archive
from kvtrim.errors import CacheError, CacheFileError, FileError
from kvtrim.hf.cache import Cache, load_cache
from kvtrim.hf.models import fingerprint
from kvtrim.hf.models.architectures import layout
from kvtrim.hf.view import view_file
from kvtrim.methods.settings import places
from kvtrim.prompts.document import Document
from kvtrim.report.viewer.exhibit import Exhibit, Stop
from kvtrim.serve.library import Entry, Library, check_name, key_of
from kvtrim.serve.request import How

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Prints:
    """What tells a model and its tokenizer from others, worked out once."""

    label: str  # what the user calls the model
    model: str
    tokenizer: str

    @classmethod
    def of(cls, label: str, model: Any, tokenizer: Any) -> "Prints":
        """Those of a loaded model."""
        own = key_of(fingerprint.of_model(model))
        return cls(label, own, fingerprint.of_tokenizer(tokenizer))


def key(prints: Prints, document: Document, how: How) -> str:
    """The hash under which the cache of a document is kept."""
    asked, own = how.request, {k: v for k, v in vars(how).items() if k != "request"}
    own |= {"method": asked.name, "keep": str(asked.keep), "settings": dict(asked.settings)}
    spans = {name: units for name, units in document.spans.items()}
    return key_of(archive.FORMAT, prints.model, prints.tokenizer, document.text, spans, own)


def find(library: Library, prints: Prints, document: Document, how: How) -> Entry | None:
    """The document read in exactly this way before; None if it was not.

    A method of one's own may have changed since, so it is never taken for the same.
    """
    return None if places([how.request.name]) else library.find(key(prints, document, how))


def add(
    library: Library,
    name: str,
    model: Any,
    tokenizer: Any,
    prints: Prints,
    document: str | Document,
    how: How,
    progress: Progress | None = None,
) -> tuple[Entry, bool]:
    """Keep a document under a name; whether it had to be read for that.

    Raises:
        UsageError: no name, or as `kvtrim.compress`.
        FileError: the library cannot be written to.
    """
    check_name(name)
    document = Document.of(document)
    found = find(library, prints, document, how)
    if found is not None and verify(library, found) is None:
        found = found if found.name == name else library.name_again(found, name)
        if found is not None:
            return found, False
    cache = compress(
        model,
        tokenizer,
        document,
        method=how.request,
        chat=how.chat,
        system=how.system,
        truncate=how.truncate,  # pyright: ignore[reportArgumentType] (the caller's, checked there)
        prefill_chunk=how.prefill_chunk,
        progress=progress,
    )
    return keep(library, name, tokenizer, prints, document, how, cache), True


def keep(
    library: Library,
    name: str,
    tokenizer: Any,
    prints: Prints,
    document: Document,
    how: How,
    cache: Cache,
) -> Entry:
    """Keep a cache that was made of a document in this way."""
    entry = Entry(
        name=name,
        key=key(prints, document, how),
        model=prints.label,
        model_print=prints.model,
        tokenizer_print=prints.tokenizer,
        method=cache.request.name,
        keep=str(how.request.keep),
        tokens=cache.seen,
        characters=len(document.text),
        text_sha256=hashlib.sha256(document.text.encode()).hexdigest(),
        held_bytes=cache.held_bytes,
        full_bytes=cache.full_bytes,
        made=time.time(),
        settings=dict(cache.request.settings),
        chat=how.chat,
        system=how.system,
        remark=cache.remark,
    )

    def write(path: Path) -> None:
        cache.save(path, tokenizer)

    return library.add(entry, document.text, write)


def require_own(entry: Entry, prints: Prints) -> None:
    """Refuse another model's document before any of it is read.

    Raises:
        CacheError: naming the model that read it.
    """
    if entry.model_print != prints.model:
        raise CacheError(
            f"@{entry.name} was read by another model ({entry.model}), not by {prints.label}: ask "
            f"it with --model {entry.model}, or compress its text again under another name"
        )
    if entry.tokenizer_print != prints.tokenizer:
        raise CacheError(
            f"@{entry.name} was read with another tokenizer or chat template of {entry.model}; "
            "compress its text again"
        )


def load(
    library: Library,
    name: str,
    model: Any,
    tokenizer: Any,
    prints: Prints,
    method: str | None = None,
) -> tuple[Entry, Cache]:
    """A document's cache, ready to be asked.

    Args:
        method: the `module:NAME` of one's own that made it, which a file does not get imported.

    Raises:
        UsageError: no such document.
        CacheError: it is another model's, or its file is damaged.
    """
    entry = library.get(name)
    return entry, load_entry(library, entry, model, tokenizer, prints, method)


def load_entry(
    library: Library,
    entry: Entry,
    model: Any,
    tokenizer: Any,
    prints: Prints,
    method: str | None = None,
) -> Cache:
    """The cache of exactly this document, whatever has its name by now. Raises as `load`."""
    require_own(entry, prints)
    cache = load_cache(library.cache_path(entry), model, tokenizer, method)
    library.use(entry)
    return cache


def show(library: Library, entry: Entry, model: Any, tokenizer: Any) -> Exhibit:
    """What was kept of a document of this model, as a page; its cache is not loaded.

    Raises:
        CacheFileError: its file is damaged.
    """
    layers = layout(model, allow_untested=True).managed
    held = Stop(entry.method, entry.keep, (), entry.held_bytes, entry.full_bytes, entry.remark)
    return view_file(library.cache_path(entry), tokenizer, layers, held)


def verify(library: Library, entry: Entry) -> str | None:
    """What is wrong with a document's files; None if they are as they were written."""
    try:
        record = archive.open_archive(library.cache_path(entry))
        record.read()
        library.text(entry)
    except (CacheFileError, FileError) as error:
        return str(error)
    return None
