"""A long prompt being read, a chunk at a time, between others' tokens."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from kvtrim.engine.batch import joinable
from kvtrim.hf.base import cache_keyword
from kvtrim.hf.cache import Cache
from kvtrim.hf.pack import base_of
from kvtrim.serve.memory import Document


@dataclass(eq=False)
class Reading:
    """A prompt on its way into memory.

    Methods that choose over the whole prompt at once read it in one pass.
    """

    key: Hashable
    cache: Cache
    ids: list[int]
    reserved: int = 0
    done: int = 0
    waiting: list[Any] = field(default_factory=list)  # requests that need it
    complete: Callable[[Cache], None] | None = None  # told once, before it is shared
    failed: Callable[[Exception], None] = lambda error: None
    told: Callable[[int, int], None] = lambda done, out_of: None
    wanted: Callable[[], bool] = lambda: True
    subject: str = ""

    @property
    def whole(self) -> bool:
        """It cannot be read in chunks."""
        return self.cache.method.propagation.narrows

    def read(self, model: Any, count: int) -> bool:
        """Read so many tokens more; whether that was all. The model has to be attached."""
        count = len(self.ids) if self.whole else count
        part = self.ids[self.done : self.done + count]
        with torch.no_grad():
            model(
                input_ids=torch.tensor([part], device=model.device),
                **cache_keyword(self.cache),
                logits_to_keep=1,
            )
        self.done += len(part)
        self.told(self.done, len(self.ids))
        return self.done >= len(self.ids)

    def document(self) -> Document:
        """What was read, ready to be continued."""
        document = document_of(self.key, self.cache)
        document.note_subject(self.subject)
        return document


def document_of(key: Hashable, cache: Cache) -> Document:
    """A cache of one prompt, as several requests continue it."""
    facts = cache.seen, cache.held_bytes, cache.full_bytes
    ids = () if cache.token_ids is None else tuple(cache.token_ids.unique().tolist())
    entries = base_of(cache) if joinable(cache.session) else cache
    return Document(key, entries, *facts, ids)
