"""Tokens back into text, piece by piece: what is certain is given, the rest is held back."""

from collections.abc import Sequence
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


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token stands for, special tokens too; together they are the whole text.

    Of tokens that share a character, the last one has it and the others are empty.
    """
    text = Detokenizer(tokenizer, keep_special=True)
    found = [text.add([token]) for token in ids]
    if found:
        found[-1] += text.end()
    return found
