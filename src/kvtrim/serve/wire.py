"""Answers in the words of OpenAI's API, whole or as events of a stream."""

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any

from kvtrim.serve import protocol
from kvtrim.serve.request import Done, Token, Usage
from kvtrim.serve.service import Choice, Service

_END = "data: [DONE]\n\n"
_REUSED = attrgetter("reused_tokens")


def _data(body: dict[str, Any], event: str | None = None) -> str:
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {json.dumps(body)}\n\n"


class Form(ABC):
    """How one endpoint says its answers."""

    prefix: str

    def __init__(self, asked: protocol.Asked, service: Service):
        self._asked, self._tokenizer = asked, service.tokenizer
        self.id, self._made = f"{self.prefix}{uuid.uuid4().hex}", int(time.time())
        self._usages: dict[int, Usage] = {}  # of choices that are done

    @abstractmethod
    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""

    def begin(self, count: int) -> Iterator[str]:
        """Events before the first token."""
        yield from ()

    @abstractmethod
    def event(self, number: int, event: Token | Done) -> Iterator[str]:
        """Events of one token, or of an answer's end."""

    @abstractmethod
    def end(self) -> Iterator[str]:
        """Events after the last answer."""

    def _piece(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special_tokens=False)

    def _usage(self, each: Sequence[Usage]) -> dict[str, Any]:
        return usage(each, self._asked.n or 1)

    def _in_order(self) -> list[Usage]:
        return [one for _, one in sorted(self._usages.items())]

    @property
    def _with_usage(self) -> bool:
        options = self._asked.stream_options
        return options is not None and bool(options.include_usage)


def usage(each: Sequence[Usage], n: int = 1) -> dict[str, Any]:
    """What answers took together, and what kvtrim adds to OpenAI's words.

    Args:
        each: in the order of the choices: `n` to every prompt, which was read once.
    """
    firsts = [min(each[at : at + n], key=_REUSED) for at in range(0, len(each), n)]
    prompt, reused = sum(one.prompt_tokens for one in firsts), sum(map(_REUSED, firsts))
    written = sum(one.completion_tokens for one in each)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": reused},
        "kvtrim": facts(firsts[0]) | {"read_tokens": prompt - reused, "reused_tokens": reused},
    }


def facts(one: Usage) -> dict[str, Any]:
    """Tokens read and reused, bytes and seconds."""
    return {
        "read_tokens": one.prompt_tokens - one.reused_tokens,
        "reused_tokens": one.reused_tokens,
        "held_bytes": one.held_bytes,
        "full_bytes": one.full_bytes,
        "first_token_s": round(one.first_token_s, 4),
        "seconds": round(one.seconds, 4),
    }


class Chat(Form):
    """`/v1/chat/completions`."""

    prefix = "chatcmpl-"

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """One `chat.completion`."""
        said = [
            {
                "index": number,
                "message": {"role": "assistant", "content": each.text, "refusal": None},
                "logprobs": self._logprobs(each.tokens),
                "finish_reason": each.reason,
            }
            for number, each in enumerate(choices)
        ]
        body = self._body("chat.completion", said)
        return {**body, "usage": self._usage([each.usage for each in choices])}

    def begin(self, count: int) -> Iterator[str]:
        """The role of every answer."""
        for number in range(count):
            yield self._chunk(number, {"role": "assistant", "content": ""}, None)

    def event(self, number: int, event: Token | Done) -> Iterator[str]:
        """One `chat.completion.chunk`."""
        if isinstance(event, Done):
            self._usages[number] = event.usage
            yield self._chunk(number, {}, None, event.reason)
        elif event.text or event.logprob is not None:
            yield self._chunk(number, {"content": event.text}, self._logprobs([event]))

    def end(self) -> Iterator[str]:
        """Usage, if asked for, and the end."""
        if self._with_usage:
            body = self._body("chat.completion.chunk", [])
            yield _data({**body, "usage": self._usage(self._in_order())})
        yield _END

    def _chunk(
        self, number: int, delta: dict[str, Any], logprobs: Any, reason: str | None = None
    ) -> str:
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        body = self._body("chat.completion.chunk", [choice])
        return _data({**body, "usage": None} if self._with_usage else body)

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        own = {"id": self.id, "object": kind, "created": self._made, "model": self._asked.model}
        return {**own, "choices": choices}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not any(each.logprob is not None for each in tokens):
            return None
        said = [
            {
                **self._likely(each.id, each.logprob or 0.0),
                "top_logprobs": [self._likely(*one) for one in each.top],
            }
            for each in tokens
        ]
        return {"content": said, "refusal": None}

    def _likely(self, token: int, logprob: float) -> dict[str, Any]:
        piece = self._piece(token)
        return {"token": piece, "logprob": logprob, "bytes": list(piece.encode())}


class Completion(Form):
    """`/v1/completions`."""

    prefix = "cmpl-"

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """One `text_completion`."""
        said = [self._choice(n, e.text, e.tokens, e.reason) for n, e in enumerate(choices)]
        return {
            **self._body(said),
            "usage": self._usage([each.usage for each in choices]),
        }

    def event(self, number: int, event: Token | Done) -> Iterator[str]:
        """One part of a `text_completion`."""
        if isinstance(event, Done):
            self._usages[number] = event.usage
            yield _data(self._body([self._choice(number, "", [], event.reason)]))
        elif event.text or event.logprob is not None:
            yield _data(self._body([self._choice(number, event.text, [event], None)]))

    def end(self) -> Iterator[str]:
        """Usage, if asked for, and the end."""
        if self._with_usage:
            yield _data(
                {
                    **self._body([]),
                    "usage": self._usage(self._in_order()),
                }
            )
        yield _END

    def _body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        own = {"id": self.id, "object": "text_completion", "created": self._made}
        return {**own, "model": self._asked.model, "choices": choices}

    def _choice(
        self, number: int, text: str, tokens: Sequence[Token], reason: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if any(each.logprob is not None for each in tokens):
            logprobs = {
                "tokens": [self._piece(each.id) for each in tokens],
                "token_logprobs": [each.logprob for each in tokens],
                "top_logprobs": [{self._piece(t): p for t, p in each.top} for each in tokens],
            }
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}


class Response(Form):
    """`/v1/responses`."""

    prefix = "resp_"

    def __init__(self, asked: protocol.Asked, service: Service):
        super().__init__(asked, service)
        self._message, self._number = f"msg_{uuid.uuid4().hex}", 0
        self._text = ""

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """One `response`."""
        return self._body(choices[0].text, choices[0].reason, choices[0].usage)

    def begin(self, count: int) -> Iterator[str]:
        """The response and its one message, still empty."""
        empty = {**self._item(""), "status": "in_progress", "content": []}
        yield self._event("response.created", response=self._body("", None, None))
        yield self._event("response.output_item.added", output_index=0, item=empty)
        yield self._event("response.content_part.added", **self._place(), part=self._part(""))

    def event(self, number: int, event: Token | Done) -> Iterator[str]:
        """A piece of text, or all that ends with the answer."""
        if isinstance(event, Token):
            self._text += event.text
            if event.text:
                more = {**self._place(), "delta": event.text, "logprobs": []}
                yield self._event("response.output_text.delta", **more)
            return
        text, place = self._text, self._place()
        yield self._event("response.output_text.done", **place, text=text, logprobs=[])
        yield self._event("response.content_part.done", **place, part=self._part(text))
        yield self._event("response.output_item.done", output_index=0, item=self._item(text))
        body = self._body(text, event.reason, event.usage)
        kind = "response.completed" if event.reason == "stop" else "response.incomplete"
        yield self._event(kind, response=body)

    def end(self) -> Iterator[str]:
        """Nothing more."""
        yield from ()

    def _event(self, kind: str, **body: Any) -> str:
        self._number += 1
        return _data({"type": kind, "sequence_number": self._number - 1, **body}, kind)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._message, "output_index": 0, "content_index": 0}

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _item(self, text: str) -> dict[str, Any]:
        own = {"type": "message", "id": self._message, "role": "assistant"}
        return {**own, "status": "completed", "content": [self._part(text)]}

    def _body(self, text: str, reason: str | None, used: Usage | None) -> dict[str, Any]:
        status = {None: "in_progress", "stop": "completed"}.get(reason, "incomplete")
        asked = self._asked
        body: dict[str, Any] = {
            "id": self.id,
            "object": "response",
            "created_at": self._made,
            "model": asked.model,
            "status": status,
            "error": None,
            "incomplete_details": (
                {"reason": "max_output_tokens"} if status == "incomplete" else None
            ),
            "instructions": None,
            "metadata": {},
            "output": [] if reason is None else [self._item(text)],
            "parallel_tool_calls": False,
            "temperature": asked.temperature,
            "tool_choice": "none",
            "tools": [],
            "top_p": asked.top_p,
            "usage": None,
        }
        if used is not None:
            body["usage"] = {
                "input_tokens": used.prompt_tokens,
                "input_tokens_details": {"cached_tokens": used.reused_tokens},
                "output_tokens": used.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": used.prompt_tokens + used.completion_tokens,
            }
            body["kvtrim"] = facts(used)
        return body
