"""Text as tokens come: what is certain is shown, what may become a stop is held back."""

from collections.abc import Callable, Sequence
from typing import Any

from kvtrim.prompts.detokenizer import Detokenizer


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
