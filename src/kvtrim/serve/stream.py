"""Text as tokens come: what is certain is shown, what later tokens may change is held back."""

from collections.abc import Callable, Sequence
from typing import Any

_HALF = "\ufffd"  # what bytes of a character decode to before the rest of it is there
_LONGEST = 8  # tokens that one character may take; after that it is no character


class Detokenizer:
    """Tokens of one answer into pieces of text; the pieces together are the decoded answer.

    Tokens are decoded after a few of those before them, since a tokenizer may join them.
    """

    def __init__(self, tokenizer: Any, keep_special: bool = False):
        self._tokenizer, self._skip = tokenizer, not keep_special
        self.ids: list[int] = []
        self._from = self._shown = 0  # decoded from here; shown up to here

    def add(self, ids: Sequence[int]) -> str:
        """The text that these tokens settle."""
        return "".join(map(self._next, ids))

    def _next(self, token: int) -> str:
        self.ids.append(token)
        text = self._piece()
        if text.endswith(_HALF) and len(self.ids) - self._shown < _LONGEST:
            return ""
        if text:
            self._from, self._shown = self._shown, len(self.ids)
        return text

    def end(self) -> str:
        """What was held back."""
        text = self._piece()
        self._from = self._shown = len(self.ids)
        return text

    def _piece(self) -> str:
        before = self._decode(self._from, self._shown)
        return self._decode(self._from, len(self.ids))[len(before) :]

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self.ids[start:end], skip_special_tokens=self._skip)


class Stops:
    """Texts at which an answer ends; what may become one of them is held back.

    Args:
        texts: none of them empty. The answer ends before the one that is complete first.
    """

    def __init__(self, texts: Sequence[str] = ()):
        self._texts, self._held = [text for text in texts if text], ""
        self.found: str | None = None

    def add(self, piece: str) -> str:
        """The part of the text so far that can be shown."""
        if self.found is not None:
            return ""
        text = self._held + piece
        places = [(text.find(stop), stop) for stop in self._texts if stop in text]
        if places:
            at, self.found = min(places)
            self._held = ""
            return text[:at]
        held = max((_overlap(text, stop) for stop in self._texts), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def end(self) -> str:
        """What was held back, if nothing stopped the answer."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that a stop begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class Streamer:
    """What transformers' `generate` takes as `streamer`, handing text to a function."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]):
        self._text, self._show, self._prompt = Detokenizer(tokenizer), show, True

    def put(self, ids: Any) -> None:
        """New tokens; the first time it is the prompt, which is not shown."""
        if self._prompt:
            self._prompt = False
            return
        self._show(self._text.add(ids.flatten().tolist()))

    def end(self) -> None:
        """The answer is complete."""
        self._show(self._text.end())
