"""From what a client asked over HTTP to requests of the scheduler, and their events back."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtrim.errors import KvtrimError, UsageError
from kvtrim.methods.request import Request as Settled
from kvtrim.prompts import conversation
from kvtrim.serve import documents, protocol
from kvtrim.serve.documents import How, Prints
from kvtrim.serve.library import Entry, Library, check_name
from kvtrim.serve.limits import Defaults, Limits
from kvtrim.serve.request import (
    Done,
    Event,
    Failed,
    Refused,
    Request,
    Sampling,
    Token,
    Upload,
    Usage,
)
from kvtrim.serve.scheduler import Scheduler

_REMEMBERED = 64  # uploads that failed
_NEW_TOKENS = 512  # of an answer, if nobody says how many it may have


@dataclass(frozen=True)
class Choice:
    """One whole answer."""

    text: str
    tokens: list[Token]
    reason: str
    usage: Usage


class Asking:
    """Answers under way to one HTTP request; leaving the `with` block gives their places back."""

    def __init__(self, requests: Sequence[Request], events: "asyncio.Queue[tuple[int, Event]]"):
        self._requests, self._events = requests, events
        self.count = len(requests)

    def __enter__(self) -> "Asking":
        return self

    def __exit__(self, *exception: object) -> None:
        for request in self._requests:
            request.gone.set()

    async def events(self) -> AsyncIterator[tuple[int, Token | Done]]:
        """What happens to which answer, until all are done.

        Raises:
            Exception: what went wrong with one of them.
        """
        left = self.count
        while left:
            number, event = await self._events.get()
            if isinstance(event, Failed):
                raise event.error
            left -= isinstance(event, Done)
            yield number, event

    async def choices(self) -> list[Choice]:
        """All answers, whole."""
        tokens: list[list[Token]] = [[] for _ in range(self.count)]
        done: dict[int, Done] = {}
        async for number, event in self.events():
            if isinstance(event, Done):
                done[number] = event
            else:
                tokens[number].append(event)
        return [
            Choice("".join(t.text for t in own), own, done[n].reason, done[n].usage)
            for n, own in enumerate(tokens)
        ]


class Service:
    """One model, its library, and who asks."""

    def __init__(
        self,
        label: str,
        model: Any,
        tokenizer: Any,
        library: Library,
        limits: Limits,
        defaults: Defaults,
    ):
        self.id = Path(label).name
        self.tokenizer, self.library, self.defaults = tokenizer, library, defaults
        self.prints = Prints.of(label, model, tokenizer)
        self.scheduler = Scheduler(model, tokenizer, self.prints, library, limits)
        self.uploads: dict[str, Upload] = {}
        self.failed: dict[str, str] = {}  # why the last upload of a name came to nothing
        self.made = int(time.time())
        Settled.of(defaults.method, defaults.keep)

    # Models and documents

    def documents(self) -> list[Entry]:
        """The documents of this model."""
        entries, _ = self.library.entries()
        return [each for each in entries if each.model_print == self.prints.model]

    def models(self) -> list[dict[str, Any]]:
        """The model, and one for each of its documents."""
        return [self.model(each) for each in (None, *self.documents())]

    def model(self, document: Entry | None) -> dict[str, Any]:
        """The model, or one of its documents, as OpenAI lists them."""
        name, made = self.id, self.made
        if document is not None:
            name, made = f"{name}@{document.name}", int(document.made)
        return {"id": name, "created": made, "object": "model", "owned_by": "kvtrim"}

    def document(self, model: str) -> Entry | None:
        """The document that a model's name chooses; None for the model itself.

        Raises:
            Refused: there is no such model or document.
        """
        own, at, name = model.partition("@")
        if not model or own not in (self.id, self.prints.label, ""):
            raise Refused(f"there is no model {model[:80]!r} here; GET /v1/models lists them", 404)
        if not at:
            return None
        return self.find_document(name)

    def find_document(self, name: str) -> Entry:
        """One of this model's documents.

        Raises:
            Refused: there is none of that name.
        """
        try:
            entry = self.library.get(name)
        except UsageError:
            entry = None
        if entry is None or entry.model_print != self.prints.model:
            raise Refused(f"there is no document {name[:80]!r} of this model", 404)
        return entry

    def how(self, method: str | None, keep: Any, settings: dict[str, Any]) -> How:
        """How a document is to be read; a client names methods that come with kvtrim alone.

        Raises:
            UsageError: no such method, budget or setting.
        """
        chosen = method or self.defaults.method
        if ":" in chosen and chosen != self.defaults.method:
            raise UsageError("over HTTP a method is a name of `kvtrim methods`")
        if any(name.endswith("table") for name in settings):
            raise UsageError("over HTTP no setting names a file")
        return How(Settled.of(chosen, self.defaults.keep if keep is None else keep, settings))

    def upload(self, name: str, text: str, how: How) -> "asyncio.Future[Entry]":
        """Read a document and keep it; its entry, once that is done.

        Raises:
            UsageError: no name for a document.
            Refused: it is being read already, or many others are.
        """
        check_name(name)
        if name in self.uploads:
            raise Refused(f"a document {name!r} is being read; wait for it", 409)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Entry] = loop.create_future()
        done.add_done_callback(lambda future: future.cancelled() or future.exception())

        def settle(event: Any) -> None:
            if done.done():
                return  # it was removed while it was read
            if self.uploads.get(name) is upload:  # and not another one, since it was removed
                del self.uploads[name]
            if isinstance(event, Failed):
                if not upload.gone.is_set():
                    self.failed[name] = str(event.error)
                if len(self.failed) > _REMEMBERED:
                    del self.failed[next(iter(self.failed))]
                done.set_exception(event.error)
            else:
                done.set_result(event)

        self.failed.pop(name, None)

        def emit(event: Any) -> None:
            loop.call_soon_threadsafe(settle, event)

        upload = Upload(name, text, how, emit)
        self.scheduler.submit(upload)
        self.uploads[name] = upload
        return done

    def subjects(self) -> set[str]:
        """What is held or read here, as whoever routes requests names it."""
        return self.scheduler.memory.subjects().union(list(self.uploads))

    def show(self, name: str) -> str:
        """What was kept of a document, as a page.

        Raises:
            Refused: there is none of that name.
            CacheFileError: its file is damaged.
        """
        model = self.scheduler.reader.model
        return documents.show(self.library, self.find_document(name), model, self.tokenizer).html

    def remove(self, name: str) -> None:
        """Remove a document.

        Raises:
            Refused: there is none of that name.
        """
        upload = self.uploads.pop(name, None)
        if upload is not None and upload.settle():
            upload.gone.set()
            upload.emit(Failed(Refused(f"{name!r} was removed while it was read", 409)))
            return
        gone = self.scheduler.memory.known_as(name)  # also where another process removed it
        try:
            gone.add(self.find_document(name).key)
            self.library.remove(name)
        finally:
            for key in gone.difference(each.key for each in self.documents()):
                self.scheduler.forget(key)

    # Answers

    def ask(
        self,
        prompts: Sequence[tuple[list[int], list[int]]],
        asked: protocol.Asked,
        sampling: Sampling,
    ) -> Asking:
        """Submit requests for every prompt, given as (head, rest), for `n` answers each.

        Raises:
            UsageError, Refused: it cannot be done, or not now.
        """
        document = self.document(asked.model)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        requests: list[Request] = []
        firsts: list[Request] = []
        for head, rest in prompts:
            how = None if document is not None else self._compression(head, asked.kvtrim)
            before = document.tokens if document is not None else len(head)
            most = sampling.max_tokens
            if not _said_length(asked):
                most = max(1, min(most, self.scheduler.reader.window - before - len(rest)))
            self._require_fits(before + len(rest), most)
            answers: list[Request] = []
            for copy in range(asked.n or 1):
                number = len(requests) + copy

                def emit(event: Event, number: int = number) -> None:
                    loop.call_soon_threadsafe(events.put_nowait, (number, event))

                seed = None if sampling.seed is None else sampling.seed + copy
                own = Sampling(**{**vars(sampling), "seed": seed, "max_tokens": most})
                request = Request(list(rest), own, emit, document, list(head), how)
                request.deadline = time.monotonic() + self.defaults.deadline_s
                answers.append(request)
            answers[0].more = answers[1:]
            firsts.append(answers[0])
            requests += answers
        asking = Asking(requests, events)
        try:
            for request in firsts:
                self.scheduler.submit(request)
        except KvtrimError:
            asking.__exit__()
            raise
        return asking

    async def chat(
        self,
        asked: protocol.Chat | protocol.Response,
        messages: Sequence[dict[str, str]],
        sampling: Sampling,
    ) -> Asking:
        """Answer a conversation."""
        after = self.document(asked.model) is not None
        found = await asyncio.to_thread(  # a message may have millions of characters
            conversation.encode,
            self.tokenizer,
            messages,
            after_document=after,
            special=asked.kvtrim.special_tokens,
        )
        return self.ask([(found.head, found.rest)], asked, sampling)

    async def complete(self, asked: protocol.Completion, sampling: Sampling) -> Asking:
        """Continue texts."""
        if asked.echo or asked.suffix:
            raise UsageError("echo and suffix are not served; leave them out")
        if self.document(asked.model) is not None:
            raise UsageError("a document is asked by chat/completions; name the model alone")
        given = [asked.prompt] if isinstance(asked.prompt, str) else list(asked.prompt)
        special = asked.kvtrim.special_tokens
        if given and all(type(each) is int for each in given):
            raise UsageError("a prompt is text here, or a list of texts")
        texts = [str(each) for each in given]
        if not texts or len(texts) > protocol.MOST_CHOICES or not all(texts):
            raise UsageError(f"prompt: expected 1 to {protocol.MOST_CHOICES} texts, none empty")
        encode, own = conversation.encode_plain, self.tokenizer
        ids = [await asyncio.to_thread(encode, own, text, special) for text in texts]
        return self.ask([(each[:-1], each[-1:]) for each in ids], asked, sampling)

    def sampling_of(
        self, asked: protocol.Asked, max_tokens: int | None, logprobs: int | None
    ) -> Sampling:
        """How the answer's tokens are chosen: greedily unless the request says otherwise.

        Raises:
            UsageError: a value out of range.
        """
        stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
        given = {
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "top_k": asked.top_k,
            "presence_penalty": asked.presence_penalty,
            "frequency_penalty": asked.frequency_penalty,
        }
        said = {name: value for name, value in given.items() if value is not None}
        if said.get("top_p") == 0:
            said["top_p"] = 1e-9  # some clients say so and mean greedy
        if any(len(text) > 1000 for text in stop):
            raise UsageError("stop: expected texts of at most 1000 characters")
        return Sampling(
            max_tokens=_NEW_TOKENS if max_tokens is None else max_tokens,
            seed=asked.seed,
            stop=tuple(stop),
            logprobs=logprobs,
            ignore_eos=asked.ignore_eos,
            **said,
        )

    def _compression(self, head: list[int], own: protocol.Kvtrim) -> How | None:
        """How a first message is compressed; None if it is held whole."""
        how = self.how(own.method, own.keep, dict(own.settings))  # refused also where not wanted
        said = own.method is not None or own.keep is not None or bool(own.settings)
        wanted = own.compress
        if wanted is None:
            wanted = said or len(head) > self.defaults.compress_above
        return how if wanted else None

    def _require_fits(self, prompt: int, answer: int) -> None:
        reader = self.scheduler.reader
        if prompt + answer > reader.window:
            raise Refused(
                f"the prompt has {prompt} tokens and the answer may have {answer}; "
                f"{reader.limit}. Shorten it, or ask for fewer tokens (max_tokens)",
                400,
            )


def _said_length(asked: protocol.Asked) -> bool:
    """Whether the request says how long its answer may be."""
    names = ("max_tokens", "max_completion_tokens", "max_output_tokens")
    return any(getattr(asked, name, None) is not None for name in names)
