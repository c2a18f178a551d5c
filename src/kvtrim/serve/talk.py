"""A conversation in this process: turns behind a document that was read, or behind nothing."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from kvtrim.errors import UsageError
from kvtrim.hf.attach import attach
from kvtrim.hf.models.architectures import window
from kvtrim.hf.pack import Feed, Pack
from kvtrim.prompts import conversation
from kvtrim.serve import documents
from kvtrim.serve.answer import Answer, Room, Speaker
from kvtrim.serve.library import Library
from kvtrim.serve.memory import Conversation, Document, Memory
from kvtrim.serve.reading import document_of
from kvtrim.serve.request import Done, Event, Request, Sampling, Usage

_BOUND = 1 << 62  # nobody else wants the memory


@dataclass(eq=False)
class Talk:
    """Questions and answers, each of which reads what is new alone."""

    model: Any
    tokenizer: Any
    document: Document | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    usage: Usage | None = None  # of the last answer

    def __post_init__(self) -> None:
        self._pack, self._memory = Pack(self.model), Memory(_BOUND)
        self._speaker = Speaker.of(self.model, self.tokenizer)

    @classmethod
    def of(
        cls, model: Any, tokenizer: Any, label: str, library: Library, name: str | None
    ) -> "Talk":
        """About a named document, or about none."""
        if name is None:
            return cls(model, tokenizer)
        prints = documents.Prints.of(label, model, tokenizer)
        entry, cache = documents.load(library, name, model, tokenizer, prints)
        return cls(model, tokenizer, document_of(entry.key, cache))

    def ask(self, question: str, **sampling: Any) -> Iterator[str]:
        """Pieces of the answer as they come; whoever stops early keeps what there is.

        A question that got no words is taken back: templates want one answer to each.

        Raises:
            UsageError: the conversation exceeds the model's window.
        """
        self.messages.append({"role": "user", "content": question})
        text = ""
        try:
            for piece in self._answer(Sampling(**sampling)):
                text += piece
                yield piece
        except Exception:
            text = ""
            raise
        finally:
            if text.strip():
                self.messages.append({"role": "assistant", "content": text})
            else:
                del self.messages[-1]

    def undo(self) -> bool:
        """Take the last question and its answer back; whether there was one."""
        before = len(self.messages)
        while self.messages and self.messages[-1]["role"] != "user":
            self.messages.pop()
        if self.messages:
            self.messages.pop()
        return len(self.messages) < before

    def _answer(self, sampling: Sampling) -> Iterator[str]:
        after = self.document is not None
        found = conversation.encode(self.tokenizer, self.messages, after_document=after)
        ids = found.head + found.rest
        most = window(self.model)
        before = self.document.tokens if self.document is not None else 0
        if before + len(ids) + sampling.max_tokens > most:
            raise UsageError(
                f"the conversation has {before + len(ids)} tokens, and the model's window takes "
                f"{most}; undo turns, begin anew, or ask for fewer new tokens"
            )
        events: SimpleQueue[Event] = SimpleQueue()
        room = len(ids) + sampling.max_tokens
        talk = self._memory.resume(self.document, ids, room)
        if talk is None:
            talk = Conversation.begin(self.document, room)
        talk.expect(ids)
        answer = Answer(
            Request(ids, sampling, events.put), self._speaker, self.document, talk,
            before + len(talk.ids), Room(0, 0), 0,
        )  # fmt: skip
        whole = True  # a cache that was left within a pass is of no use
        try:
            with attach(self.model):
                while not answer.ended:
                    new, whole = answer.unread(), False
                    logits = self._pack.feed(self.model, [Feed(talk.into, new)])
                    complete, whole = answer.note_read(new), True
                    if complete:
                        answer.extend(logits[0])
                    while not events.empty():
                        event = events.get()
                        if isinstance(event, Done):
                            self.usage = event.usage
                        elif text := getattr(event, "text", ""):
                            yield text
        finally:
            if whole:
                self._memory.remember(talk)
