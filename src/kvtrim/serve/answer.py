"""One answer under way: what was fed of it, what was written, when it ends."""

import logging
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from kvtrim.engine.branch import Branch, Stem
from kvtrim.hf.cache import Cache
from kvtrim.hf.models.architectures import head_width
from kvtrim.prompts.detokenizer import Detokenizer
from kvtrim.serve.memory import Conversation, Document
from kvtrim.serve.request import Done, Request, Token, Usage
from kvtrim.serve.sampler import Sampler
from kvtrim.serve.stream import Stops
from kvtrim.types import Float, Tensor

log = logging.getLogger("kvtrim.serve")


@dataclass(frozen=True)
class Speaker:
    """What answers need to know of the model."""

    tokenizer: Any
    ends: frozenset[int]  # tokens at which an answer ends
    repetition: float
    device: torch.device
    entry_bytes: int  # of one token's K and V in all layers
    windows: tuple[int, ...] = ()  # of layers that slide
    layers: int = 1

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> "Speaker":
        """Of a loaded model."""
        config, own = model.generation_config, model.config.get_text_config(decoder=True)
        ends = config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        width = head_width(own)
        entry = 2 * own.num_hidden_layers * own.num_key_value_heads * width * model.dtype.itemsize
        repetition = config.repetition_penalty or 1.0
        windows = tuple(each.sliding_window for each in Cache(model, "full").stock_layers())
        given = model.device, entry, windows, own.num_hidden_layers
        return cls(tokenizer, frozenset(ends), repetition, *given)

    def full_bytes(self, tokens: int) -> int:
        """What a full cache of so many tokens holds."""
        slide = sum(min(tokens, window - 1) for window in self.windows)
        whole = (self.layers - len(self.windows)) * tokens
        return (slide + whole) * self.entry_bytes // self.layers


@dataclass(eq=False)
class Share:
    """Bytes that several answers hold together, until the last of them ends."""

    nbytes: int
    users: int


@dataclass(frozen=True)
class Room:
    """Bytes that answers to one prompt may come to hold: the first one, and each further one."""

    first: int
    further: int
    prompt: int = 0  # more where there are further ones, and the first one's entries are moved

    @classmethod
    def of(cls, request: Request, document: Document | None, entry_bytes: int) -> "Room":
        """Of a request; its further answers share what the first one read, or copy it."""
        new = request.sampling.max_tokens * entry_bytes
        whole = len(request.ids) * entry_bytes + new
        if document is not None and isinstance(document.entries, Cache):
            whole += document.held_bytes
            return cls(whole, whole)
        return cls(whole, new, whole - new)

    def total(self, count: int) -> int:
        """By so many answers."""
        return self.first + (count - 1) * self.further + (self.prompt if count > 1 else 0)


@dataclass(eq=False)
class Answer:
    """A request that has its place among those that decode together."""

    request: Request
    speaker: Speaker
    document: Document | None
    talk: Conversation
    reused: int  # tokens of the prompt that nobody had to read for this
    room: Room
    reserved: int  # bytes, of which `share` is no part
    share: Share | None = None
    forked: bool = False  # from the first answer to its prompt, which read that
    written: list[int] = field(default_factory=list)
    first_token_s: float = 0.0
    ended: bool = False

    def __post_init__(self) -> None:
        how, own = self.request.sampling, self.speaker
        self._sampler = Sampler(how, own.device, own.repetition)
        self._text, self._stops = Detokenizer(own.tokenizer), Stops(how.stop)
        self.talk.subject = self.request.subject
        self._said = self.request.ids
        if self.document is not None:
            self._said = [*self.document.ids, *self._said]
            self.document.note_subject(self.request.subject)

    def unread(self) -> list[int]:
        """Tokens to be fed: of the prompt, or the last one written."""
        known = len(self.talk.ids)
        return (self.request.ids + self.written)[known:]

    @property
    def reading(self) -> bool:
        """Some of the prompt is still to be read."""
        return not self.written

    def note_read(self, ids: list[int]) -> bool:
        """These were read; whether a token is to be chosen now."""
        self.talk.ids += ids
        return len(self.talk.ids) >= len(self.request.ids)

    def extend(self, logits: Float[Tensor, " vocabulary"]) -> None:
        """Choose the next token, say so, and see whether it was the last.

        What goes wrong ends this answer, and no other of the pass.
        """
        try:
            self._extend(logits)
        except Exception as error:
            log.exception("an answer failed", exc_info=error)
            self.ended = True
            self.request.fail(error)

    def _extend(self, logits: Float[Tensor, " vocabulary"]) -> None:
        how = self.request.sampling
        token, logprob, top = self._sampler.choose(logits, self._said, self.written)
        self.written.append(token)
        if len(self.written) == 1:
            self.first_token_s = time.monotonic() - self.request.came
        ends = token in self.speaker.ends and not how.ignore_eos
        text = "" if ends else self._stops.add(self._text.add([token]))
        reason = "stop" if ends or self._stops.found is not None else None
        if reason is None and len(self.written) >= how.max_tokens:
            reason = "length"
        if reason is not None and self._stops.found is None:
            text += self._stops.add(self._text.end())
            reason = "stop" if self._stops.found is not None else reason
            text += self._stops.end()
        self.request.emit(Token(token, text, logprob, top))
        if reason is not None:
            self.ended = True
            self.request.emit(Done(reason, self._usage()))

    def fork(self) -> "list[Answer]":
        """The further answers to the prompt, now that it was read: each goes on from there.

        Their prompt's entries are the first one's, which writes behind them; where the method goes
        on evicting each has a copy.
        """
        requests, self.request.more = self.request.more, []
        into, room, others = self.talk.into, self.room, []
        if not requests:
            return others
        self.reserved, stem = room.first, None
        if isinstance(into, Branch):  # whose entries are there until the last answer has ended
            held = room.first + room.prompt
            self.reserved, self.share = 0, Share(held, 1 + len(requests))
            stem = Stem(into)
        before = 0
        if self.document is not None:
            before = self.document.tokens
            self.document.users += len(requests)
        for each in requests:
            each.ids = self.request.ids
            own = into.copy() if isinstance(into, Cache) else None
            own = own or Branch(stem, room=each.sampling.max_tokens)
            talk = Conversation(self.document, own, list(self.talk.ids))
            given = each, self.speaker, self.document, talk, before + len(each.ids), room
            others.append(Answer(*given, room.further, self.share, forked=True))
        return others

    def release(self) -> int:
        """Bytes of its reservation that are free once it has ended; asked once."""
        if self.share is None:
            return self.reserved
        self.share.users -= 1
        return self.reserved + (0 if self.share.users else self.share.nbytes)

    def _usage(self) -> Usage:
        shared = self.document
        own = self.talk.nbytes
        if self.forked and isinstance(self.talk.into, Branch):
            own += len(self.request.ids) * self.speaker.entry_bytes
        before = 0 if shared is None else shared.tokens
        if shared is not None and isinstance(self.talk.into, Branch):
            own += shared.held_bytes
        read = before + len(self.request.ids)
        return Usage(
            prompt_tokens=read,
            completion_tokens=len(self.written),
            reused_tokens=self.reused,
            held_bytes=own,
            full_bytes=self.speaker.full_bytes(read + len(self.written) - 1),
            first_token_s=self.first_token_s,
            seconds=time.monotonic() - self.request.came,
        )
