"""A document with named parts, as a user hands it over: text and ranges of characters."""

import re
from bisect import bisect_left
from dataclasses import dataclass, field

from kvtrim.errors import UsageError
from kvtrim.prompts.spans import Given, Spans, as_spans, map_ends

SHOTS, SENTENCES = "shots", "sentences"
# a sentence ends at . ! ? and closing quotes before a blank, at their full-width forms,
# and at the end of its line
_SENTENCE_END = re.compile(
    r"[.!?\u2026]+[\"'\u201d\u2019)\]]*\s+"
    r"|[\u3002\uff01\uff1f]+[\u201d\u2019\u300d\u300f\uff09]*\s*"
    r"|\s*\n\s*"
)


@dataclass(frozen=True)
class Document:
    """A text whose parts have names, for methods that keep or drop parts as a whole.

    Args:
        text: the whole document.
        spans: for each name its units, a unit being one character range (start, end) or a list of
            them: `{"shots": [(0, 40), [(40, 80), (200, 220)]]}`. Blanks behind a unit belong to
            it, and so does a token that reaches beyond its end.

    Raises:
        UsageError: a range is empty, overlaps another of the same name, or lies outside the text,
            which is half of a surrogate pair somewhere.
    """

    text: str
    spans: Given = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise UsageError(f"a document is text, got {type(self.text).__name__}")
        require_characters("document", self.text)
        ranges = as_spans(self.spans, len(self.text), "characters")
        object.__setattr__(self, "spans", ranges)

    @classmethod
    def of(cls, text: "str | Document") -> "Document":
        """A text without named parts, or the document as it is."""
        return text if isinstance(text, Document) else cls(text)

    @classmethod
    def split(cls, text: str, separator: str, name: str = SHOTS) -> "Document":
        """A document cut into shots (or other parts) behind each separator.

        Raises:
            UsageError: the separator does not occur.
        """
        if not separator or separator not in text:
            raise UsageError(f"the separator {separator!r} does not occur in the document")
        ends = [found.end() for found in re.finditer(re.escape(separator), text)]
        return cls(text, {name: _between(text, ends, separator)})

    def strip(self) -> "tuple[Document, str]":
        """The document without the blanks at its end, and these."""
        end = len(self.text.rstrip())
        spans = map_ends(as_spans(self.spans), lambda at: min(at, end))
        return Document(self.text[:end], spans), self.text[end:]

    def without_leading_blanks(self) -> "Document":
        """The document from its first character that is no blank."""
        blanks = len(self.text) - len(self.text.lstrip())
        spans = map_ends(as_spans(self.spans), lambda at: max(0, at - blanks))
        return Document(self.text[blanks:], spans)

    def parts(self) -> Spans:
        """The named parts with the blanks behind each unit, and every sentence as another part."""
        found = {
            name: _with_blanks(self.text, units) for name, units in as_spans(self.spans).items()
        }
        if SENTENCES in found:
            return found
        ends = [end.end() for end in _SENTENCE_END.finditer(self.text)]
        return {**found, SENTENCES: tuple((piece,) for piece in _between(self.text, ends))}


def require_characters(what: str, text: str) -> None:
    """Refuse text with half of a surrogate pair in it, which no tokenizer and no file takes.

    Raises:
        UsageError: naming the place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the {what} holds half a character (U+{ord(text[error.start]):04X}, a lone "
            f"surrogate) at character {error.start}: read it as UTF-8, or drop it with "
            "text.encode(errors='ignore').decode()"
        ) from None


def _between(text: str, ends: list[int], separator: str = "") -> list[tuple[int, int]]:
    """The stretches of a text between these places; an empty one joins the stretch before it."""
    pieces: list[tuple[int, int]] = []
    start = 0
    for end in [*ends, len(text)]:
        if text[start:end].replace(separator, "").strip():
            pieces.append((start, end))
        elif pieces:
            pieces[-1] = (pieces[-1][0], end)
        else:
            continue  # nothing before it: it joins the stretch behind
        start = end
    return pieces


def _with_blanks(
    text: str, units: tuple[tuple[tuple[int, int], ...], ...]
) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Units with the blanks behind each of their ranges, as far as the next range."""
    starts = sorted(start for unit in units for start, _ in unit)

    def extend(end: int) -> int:
        following = bisect_left(starts, end)
        limit = starts[following] if following < len(starts) else len(text)
        return end + len(text[end:limit]) - len(text[end:limit].lstrip())

    return tuple(tuple((start, extend(end)) for start, end in unit) for unit in units)
