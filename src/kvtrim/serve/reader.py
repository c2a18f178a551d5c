"""What is read for a request, and how: a document, a long first message, a file of the library."""

from collections.abc import Hashable
from contextlib import suppress
from typing import Any

from kvtrim.errors import UsageError
from kvtrim.hf.cache import Cache
from kvtrim.hf.models.architectures import window
from kvtrim.hf.rotary import LongRope
from kvtrim.methods.request import Request as Settled
from kvtrim.prompts import Template, encode_context, frame, repeat_words
from kvtrim.prompts.document import Document as Text
from kvtrim.serve import documents
from kvtrim.serve.documents import Prints
from kvtrim.serve.library import Entry, Library, key_of
from kvtrim.serve.memory import Document
from kvtrim.serve.reading import Reading, document_of
from kvtrim.serve.request import Failed, Refused, Request, Upload


class Reader:
    """A model and the library that it reads into and out of."""

    def __init__(self, model: Any, tokenizer: Any, prints: Prints, library: Library):
        self.model, self.tokenizer = model, tokenizer
        self.prints, self.library = prints, library
        switch = LongRope.of(model).switch
        self.window = min(window(model), switch or window(model))
        self.limit = f"the model's window takes {self.window}"  # said where it is exceeded
        if switch == self.window:
            self.limit = (
                f"above {switch} tokens this model turns keys by other rotary frequencies, and "
                "the server does not go there (kvtrim ask and chat do)"
            )

    def require_own(self, entry: Entry) -> None:
        """Refuse another model's document: CacheError."""
        documents.require_own(entry, self.prints)

    def load(self, entry: Entry) -> Document:
        """A document of the library, from its file. Raises as `documents.load`."""
        given = self.library, entry, self.model, self.tokenizer, self.prints
        return document_of(entry.key, documents.load_entry(*given))

    def reuse(self, upload: Upload) -> bool:
        """Whether a document was read in this way before; then it has this name too, and says so.

        Raises:
            UsageError: the document is empty.
        """
        text = Text.of(upload.text)
        if not text.text.strip():
            raise UsageError("the document is empty")
        entry = documents.find(self.library, self.prints, text, upload.how)
        if entry is None or documents.verify(self.library, entry) is not None:
            return False
        if entry.name != upload.name:
            entry = self.library.name_again(entry, upload.name)
        if entry is None:
            return False
        upload.tokens = upload.done = entry.tokens
        self._give(upload, entry)
        return True

    def upload(self, upload: Upload) -> Reading:
        """A document to read and to keep.

        Raises:
            UsageError: it exceeds the model's window, or cannot be read as asked.
        """
        text, how = Text.of(upload.text), upload.how
        template = Template(how.chat, how.system)
        around = template.frame(self.tokenizer)
        prompt = encode_context(self.tokenizer, around, text)
        if len(prompt) > self.window - 1:
            raise UsageError(
                f"the document has {len(prompt)} tokens and leaves no room for a question; "
                f"{self.limit}: shorten it"
            )
        cache = Cache(
            self.model,
            how.request,
            prompt_tokens=len(prompt),
            spans=prompt.spans,
            words=repeat_words(self.tokenizer, around),
            template=template,
        )

        def complete(cache: Cache) -> None:
            if upload.gone.is_set():
                raise _refusal(upload)
            given = self.library, upload.name, self.tokenizer, self.prints, text, how, cache
            self._give(upload, documents.keep(*given))

        def tell(done: int, out_of: int) -> None:
            upload.done = done

        upload.tokens = len(prompt)
        key = documents.key(self.prints, text, how)
        reading = Reading(key, cache, prompt.ids, complete=complete, told=tell)
        reading.failed = lambda error: upload.emit(Failed(error))
        reading.wanted = lambda: not upload.gone.is_set()
        reading.subject = upload.subject
        return reading

    def _give(self, upload: Upload, entry: Entry) -> None:
        """Say that a document is there.

        Raises:
            Refused: it was removed while it was written, and now it is.
        """
        if not upload.settle():
            with suppress(UsageError):  # another process was faster
                self.library.remove(upload.name)
            raise _refusal(upload)
        upload.emit(entry)

    def head_key(self, request: Request) -> str:
        """What tells a first message, and how it is compressed, from others."""
        asked = _compression(request)
        return key_of("head", request.head, asked.name, str(asked.keep), dict(asked.settings))

    def head(self, request: Request, key: Hashable) -> Reading:
        """A first message to compress."""
        words = repeat_words(self.tokenizer, frame(self.tokenizer))
        cache = Cache(
            self.model, _compression(request), prompt_tokens=len(request.head), words=words
        )
        return Reading(key, cache, request.head, wanted=lambda: False)  # but by who waits for it


def _refusal(upload: Upload) -> Refused:
    return Refused(f"{upload.name!r} was removed while it was read", 409)


def _compression(request: Request) -> Settled:
    """How a first message is compressed."""
    if request.how is None:
        raise ValueError("this first message is held whole")
    return request.how.request
