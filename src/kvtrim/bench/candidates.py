"""What `speed` measures: plain transformers, methods with their budgets, peers; opened alike."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from kvtrim.errors import UnknownNameError, UsageError
from kvtrim.hf.attach import attach
from kvtrim.hf.base import cache_keyword
from kvtrim.hf.cache import Cache
from kvtrim.hf.decode import LEAST, open_stepper, why_plain
from kvtrim.hf.generate import mean_entries, plain_cache, read, stored_bytes
from kvtrim.methods.keep import Keep
from kvtrim.methods.method import Method
from kvtrim.methods.request import Request
from kvtrim.methods.settings import find, spell_out, split
from kvtrim.methods.variant import Variant
from kvtrim.records import HeldFigures
from kvtrim.types import Tensor

PLAIN = "transformers"
"""Name of the reference: sdpa attention and DynamicCache, kvtrim not attached."""

Feed = Callable[[Tensor], Tensor]
"""Reads token ids [B, n] after those read before; gives the logits of the last [B, 1, vocab]."""


Steps = AbstractContextManager[tuple[Feed, bool]]
"""Decoding steps, and whether they are captured; entering takes time that belongs to no step."""


@dataclass(frozen=True)
class Subject:
    """A cache and the way to feed it."""

    cache: Any
    feed: Feed
    full: bool = True  # whether it can tell the bytes of a full cache
    captured: Callable[[int], Steps] | None = None  # at most so many, where that can be done

    def steps(self, count: int) -> Steps:
        """The way to feed at most so many single tokens after the prompt."""
        return nullcontext((self.feed, False)) if self.captured is None else self.captured(count)

    def figures(self) -> HeldFigures:
        """Bytes and entries that it holds now."""
        held, full = stored_bytes(self.cache)
        return {
            "held_bytes": held,
            "entries": mean_entries(self.cache),
            "full_bytes": full if self.full else None,
        }


@dataclass(frozen=True)
class Candidate:
    """A method with a budget, plain transformers, or another library's method."""

    method: str
    keep: str = ""
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    peer: str = ""

    @cached_property
    def settled(self) -> Method:
        """The method with its parameters, as `find` gives it; not yet ready for any model."""
        return find(self.method, **self.settings)

    @cached_property
    def request(self) -> Request:
        """Method and budget, as caches take them; the full cache where there is no budget.

        Raises:
            BudgetError: a budget below what the method always keeps.
        """
        found = self.at(self.keep or 1.0)
        found.method.require_room(found.keep)
        return found

    def at(self, keep: str | float) -> Request:
        """The method with another budget, which may be too small for it."""
        return Request(self.method, self.settings, self.settled, Keep.parse(keep))

    @property
    def label(self) -> str:
        """The method with its parameters, as it may be asked for: snapkv:window=16."""
        return str(Variant(self.method, self.settings))

    @property
    def said(self) -> str:
        """Label and budget, for progress."""
        return f"{self.label} {self.keep}".strip()

    def record(self) -> dict[str, Any]:
        """What a run says of it: its label and budget, and everything that it is made of."""
        own = {"method": self.label, "keep": self.keep}
        if self.peer or self.method == PLAIN:
            return own | {"peer": self.peer}
        parameters = spell_out(self.settled)
        return own | {"name": self.method, "settings": self.settings, "parameters": parameters}

    @contextmanager
    def open(
        self, model: Any, length: int, chunk: int | None, capture: bool = True
    ) -> Iterator[Subject]:
        """An empty cache for prompts of so many tokens, and the model ready for it."""
        if self.method == PLAIN:
            cache = plain_cache(model)
            yield Subject(cache, make_feed(model, cache))
            return
        prompt = length if chunk is not None else None
        with attach(model):
            cache = Cache(model, self.request, prompt_tokens=prompt)
            yield Subject(
                cache, make_feed(model, cache), captured=capture_steps(model, cache, capture)
            )


def capture_steps(model: Any, cache: Cache, capture: bool) -> Callable[[int], Steps] | None:
    """Captured steps, if they are wanted and can be had."""
    if not capture or why_plain(model, cache, LEAST, {}) is not None:
        return None

    @contextmanager
    def steps(count: int) -> Iterator[tuple[Feed, bool]]:
        with open_stepper(model, cache, count) as step:
            yield lambda ids: step(ids)[:, None], step.plain is None

    return steps


def make_feed(model: Any, cache: Any) -> Feed:
    """Passes over the model that fill a cache."""

    def feed(ids: Tensor) -> Tensor:
        return model(input_ids=ids, **cache_keyword(cache), logits_to_keep=1).logits

    return feed


def candidates(
    methods: Sequence[str], keeps: Sequence[str], settings: dict[str, Any] | None = None
) -> list[Candidate]:
    """Plain transformers, then every method with every budget; `full` needs none.

    Args:
        methods: names, with parameters of their own or without (`snapkv:window=16`).
        settings: parameters for all methods that have them and do not set them themselves.

    Raises:
        UsageError: an unknown method, a parameter that none of them has or leaves open, or a
            budget that is none.
    """
    settings = settings or {}
    chosen, unused = [Candidate(PLAIN)], dict(settings)
    for keep in keeps:
        Keep.parse(keep)
    for name in methods:
        variant, method = Variant.parse(name), find(name)
        left = {key: value for key, value in settings.items() if key not in variant.settings}
        shared = {} if method.full else split(name, left)[0]
        own = variant.merge(shared)
        unused = {key: value for key, value in unused.items() if key not in shared}
        budgets = [""] if method.full else keeps
        cells = [Candidate(variant.name, keep, own) for keep in budgets]
        for cell in cells:
            _ = cell.settled  # refuses what cannot be
        chosen += cells
    if unused:
        _refuse(methods, unused)
    return list({(c.label, c.keep): c for c in chosen}.values())


def _refuse(methods: Sequence[str], unused: dict[str, Any]) -> None:
    """Say why parameters act on none of the methods."""
    name = next(iter(unused))
    if any(name in Variant.parse(each).settings for each in methods):
        raise UsageError(f"--set {name}: the methods that have it set their own; leave it out")
    find(next((each for each in methods if not find(each).full), methods[0]), **unused)
    raise UnknownNameError("parameter", name, [])


def require_chunks(cells: Sequence[Candidate], prefill_chunk: int | None) -> None:
    """Refuse methods that cut after every chunk without chunks, and chunks without such methods.

    Raises:
        UsageError: one of them without the other.
    """
    own = [cell.settled for cell in cells if cell.method != PLAIN]
    for method in own:
        method.require_passes(prefill_chunk)
    if prefill_chunk is not None and not any(method.schedule.chunks for method in own):
        raise UsageError(
            "--prefill-chunk changes no score of methods that are cut at the end of the prompt; "
            "leave it out, or add --set chunks=true"
        )


def require_support(model: Any, cells: Sequence[Candidate]) -> None:
    """Refuse at once a method that this model lacks something for, whatever the budget.

    Raises:
        KvtrimError: naming it.
    """
    for cell in {cell.label: cell for cell in cells}.values():
        Cache(model, cell.at(1.0), prompt_tokens=1)


def read_prompt(model: Any, ids: Tensor, cache: Cache, prefill_chunk: int | None) -> Tensor:
    """Read a prompt [B, n] as a method wants it: whole, or in passes if it cuts after each; gives
    the logits [B, vocab] of what follows.
    """
    with torch.no_grad():
        if cache.method.schedule.chunks and prefill_chunk and ids.shape[1] > prefill_chunk:
            last = (ids.shape[1] - 1) % prefill_chunk + 1
            read(model, ids[:, :-last], cache, prefill_chunk)
            ids = ids[:, -last:]
        return model(input_ids=ids, **cache_keyword(cache), logits_to_keep=1).logits[:, -1]
