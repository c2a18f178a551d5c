"""What is asked of the scheduler, and what it says back."""

import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from kvtrim.errors import KvtrimError, UsageError
from kvtrim.methods.request import Request as Settled
from kvtrim.serve.library import Entry

SUBJECT: ContextVar[str] = ContextVar("subject", default="")
"""What a request is about, as whoever routes it says (`relay.subject`); "" where nobody does."""


class Refused(KvtrimError):
    """A request that is not served now, or not at all.

    Args:
        status: as HTTP says it.
        retry_s: when it may be worth another try.
    """

    def __init__(self, message: str, status: int = 503, retry_s: int | None = None):
        super().__init__(message)
        self.status, self.retry_s = status, retry_s


@dataclass(frozen=True)
class How:
    """How a document is read: what of the request decides what its cache holds."""

    request: Settled
    chat: bool | None = None
    system: str | None = None
    truncate: str = "error"
    prefill_chunk: int | None = None


@dataclass(frozen=True)
class Sampling:
    """How an answer's tokens are chosen, and when it ends.

    Raises:
        UsageError: a value out of range.
    """

    max_tokens: int
    temperature: float = 0.0  # 0: the likeliest token
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # of the chosen token, and of so many of the likeliest
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        rules = [
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= 10, "between 0 and 10"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "between -2 and 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "between -2 and 2"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "between 0 and 20"),
            ("stop", len(self.stop) <= 16 and all(self.stop), "at most 16 texts, none empty"),
            ("seed", self.seed is None or abs(self.seed) < 2**63, "a 64-bit number"),
        ]
        for name, right, expected in rules:
            if not right:
                raise UsageError(f"{name}={getattr(self, name)!r:.60}: expected {expected}")


@dataclass(frozen=True)
class Token:
    """A new token of an answer, and the text that became certain with it."""

    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """What an answer took."""

    prompt_tokens: int
    completion_tokens: int
    reused_tokens: int  # of the prompt, those that a cache had read before
    held_bytes: int  # of the prompt and the answer: shared entries and its own
    full_bytes: int  # what a full cache of the same tokens holds
    first_token_s: float  # from the request, waiting included
    seconds: float


@dataclass(frozen=True)
class Done:
    """The answer is complete."""

    reason: str  # "stop" or "length"
    usage: Usage


@dataclass(frozen=True)
class Failed:
    """There will be no answer, or no more of it."""

    error: Exception


Event = Token | Done | Failed
Emit = Callable[[Any], None]


@dataclass(eq=False)
class Request:
    """One answer asked for.

    What comes first was read before, or is read and compressed now: `document` (of the library),
    or `head` with `how`; `ids` follow it.
    """

    ids: list[int]
    sampling: Sampling
    emit: Emit  # called in the scheduler's thread
    document: Entry | None = None
    head: list[int] = field(default_factory=list)
    how: How | None = None
    read: bool = False  # its head was read for this request
    deadline: float = float("inf")  # on time.monotonic's clock
    came: float = field(default_factory=time.monotonic)
    gone: threading.Event = field(default_factory=threading.Event)  # nobody waits for it any more
    more: list["Request"] = field(default_factory=list)  # answers to the same prompt, read once
    subject: str = field(default_factory=SUBJECT.get)

    @property
    def count(self) -> int:
        """How many answers it is about."""
        return 1 + len(self.more)

    def fail(self, error: Exception) -> None:
        """Say to all who wait for its answers that there will be none."""
        for each in (self, *self.more):
            each.emit(Failed(error))


@dataclass(eq=False)
class Upload:
    """A document to read and to keep under a name."""

    name: str
    text: str
    how: How
    emit: Emit = lambda event: None  # called with an `Entry` or `Failed`
    tokens: int = 0
    done: int = 0
    gone: threading.Event = field(default_factory=threading.Event)
    subject: str = field(default_factory=SUBJECT.get)
    _settled: threading.Lock = field(default_factory=threading.Lock)  # and never released

    def settle(self) -> bool:
        """Whether nothing became of it so far; whoever is told so says what does, and alone."""
        return self._settled.acquire(blocking=False)
