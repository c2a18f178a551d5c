"""One answer under way: what was fed of it, what was written, when it ends."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from kvtrim.engine.branch import Branch
from kvtrim.prompts.detokenizer import Detokenizer
from kvtrim.serve.memory import Conversation, Document
from kvtrim.serve.request import Done, Request, Token, Usage
from kvtrim.serve.sampler import Sampler
from kvtrim.serve.stream import Stops
from kvtrim.types import Float, Tensor


@dataclass(frozen=True)
class Speaker:
    """What answers need to know of the model."""

    tokenizer: Any
    ends: frozenset[int]  # tokens at which an answer ends
    repetition: float
    device: torch.device
    entry_bytes: int  # of one token's K and V in all layers

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> "Speaker":
        """Of a loaded model."""
        config, own = model.generation_config, model.config.get_text_config(decoder=True)
        ends = config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        width = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
        entry = 2 * own.num_hidden_layers * own.num_key_value_heads * width * model.dtype.itemsize
        repetition = config.repetition_penalty or 1.0
        return cls(tokenizer, frozenset(ends), repetition, model.device, entry)


@dataclass(eq=False)
class Answer:
    """A request that has its place among those that decode together."""

    request: Request
    speaker: Speaker
    document: Document | None
    talk: Conversation
    reused: int  # tokens of the prompt that nobody had to read for this
    reserved: int  # bytes
    written: list[int] = field(default_factory=list)
    first_token_s: float = 0.0
    ended: bool = False

    def __post_init__(self) -> None:
        how, own = self.request.sampling, self.speaker
        self._sampler = Sampler(how, own.device, own.repetition)
        self._text, self._stops = Detokenizer(own.tokenizer), Stops(how.stop)

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
        """Choose the next token, say so, and see whether it was the last."""
        how = self.request.sampling
        token, logprob, top = self._sampler.choose(logits, self.request.ids, self.written)
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

    def _usage(self) -> Usage:
        shared = self.document
        own = self.talk.nbytes
        before = 0 if shared is None else shared.tokens
        if shared is not None and isinstance(self.talk.into, Branch):
            own += shared.held_bytes
        read = before + len(self.request.ids)
        return Usage(
            prompt_tokens=read,
            completion_tokens=len(self.written),
            reused_tokens=self.reused,
            held_bytes=own,
            full_bytes=(read + len(self.written) - 1) * self.speaker.entry_bytes,
            first_token_s=self.first_token_s,
            seconds=time.monotonic() - self.request.came,
        )
