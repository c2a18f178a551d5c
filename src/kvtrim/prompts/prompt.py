"""From a context and a question to token ids, once for both protocols. Knows nothing of models.

The two parts are tokenised separately, so the ids are the same whether the question is read
together with the context (question-aware) or after it was compressed (question-agnostic).

Named parts go along as spans of tokens: `system` (all that stands before the context, start token
and template included), `context`, `question`, what a `Document` names (`shots`), and the context's
`sentences` and `structure`. A token belongs to the unit in which it begins.
"""

import re
import sys
from ast import literal_eval
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from time import monotonic
from typing import Any

from kvtrim.errors import UsageError
from kvtrim.prompts.document import Document, require_characters
from kvtrim.prompts.spans import STRUCTURE, Spans, join_spans, map_ends, structure, without

# what templates may want to escape, quote, strip or format stands in them, so that it shows
_HARD = "\"'`<&>{}[]\\%é\n\t|"
_CONTEXT, _QUESTION = f"\u2980context{_HARD}\u2980", f"\u2980question{_HARD}\u2980"
_BETWEEN = "\n\n"
_BLANKS = "\t \n\t"  # which a template may trim, and none begins or ends with
_WITHOUT_CHAT = "use chat=False (--no-chat)"
_TEMPLATE_S = 10.0  # a template takes milliseconds
_LARGEST = 10_000_000  # number in a template: repeated texts and ranges take their length

try:
    import resource
except ImportError:  # Windows
    resource = None


@dataclass(frozen=True)
class Frame:
    """The text around a context and a question: chat template, special tokens, separators."""

    before: str
    between: str
    after: str
    literal: bool = False
    """What looks like a special token in a context or question is text, not a token."""
    trims_start: bool = False
    """Blanks before the context are left out, as the template does."""
    trims_end: bool = False
    """Blanks behind the question are left out, as the template does."""

    @classmethod
    def chat(cls, tokenizer: Any, system: str | None = None) -> "Frame":
        """The tokenizer's chat template around one user message "context, blank line, question".

        Raises:
            UsageError: the tokenizer has no chat template, or one that fails, does not end, or
                does not print the message once and as it is.
        """
        if not tokenizer.chat_template:
            raise UsageError(f"this tokenizer has no chat template; {_WITHOUT_CHAT}")
        message = f"{_BLANKS}{_CONTEXT}{_BETWEEN}{_QUESTION}{_BLANKS}"
        messages = [{"role": "user", "content": message}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        text = render(tokenizer, messages)
        times = max(text.count(_CONTEXT), text.count(_QUESTION))
        before, found, rest = text.partition(_CONTEXT)
        between, also_found, after = rest.partition(_QUESTION)
        if times > 1:
            raise UsageError(
                f"the chat template prints the user's message {times} times; {_WITHOUT_CHAT}"
            )
        if not (found and also_found):
            raise UsageError(f"the chat template alters the user's message; {_WITHOUT_CHAT}")
        if system is not None and text == render(tokenizer, messages[1:]):
            raise UsageError("the chat template ignores the system message; leave it out")
        return cls(
            before.removesuffix(_BLANKS),
            between,
            after.removeprefix(_BLANKS),
            literal=True,
            trims_start=not before.endswith(_BLANKS),
            trims_end=not after.startswith(_BLANKS),
        )

    @classmethod
    def plain(cls, tokenizer: Any) -> "Frame":
        """No template: the start token if the tokenizer sets one, the context, the question."""
        starts = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
        return cls(tokenizer.bos_token if starts else "", _BETWEEN, "")


@dataclass(frozen=True)
class Template:
    """Which frame was asked for, so that later questions get the same one."""

    chat: bool | None = None  # None: the chat template where there is one
    system: str | None = None

    def frame(self, tokenizer: Any) -> Frame:
        """The text around a context and a question. Raises as `frame`."""
        return frame(tokenizer, self.chat, self.system)


@dataclass(frozen=True)
class Prompt:
    """A context and a question, or one of them alone, as token ids with their named parts."""

    context: list[int]
    question: list[int]
    spans: Spans = field(default_factory=dict)
    cut: bool = False
    """The middle of the context was left out."""

    def __len__(self) -> int:
        return len(self.context) + len(self.question)

    @property
    def ids(self) -> list[int]:
        """The whole prompt."""
        return self.context + self.question

    def with_question(self, question: "Prompt") -> "Prompt":
        """This context with a question encoded alone."""
        spans = join_spans(self.spans, question.spans, len(self.context))
        return Prompt(self.context, question.question, spans, self.cut)


@dataclass(frozen=True)
class Words:
    """What stands around the repeated text, as token ids; nothing by default."""

    first: list[int] = field(default_factory=list)  # asks for the whole context
    later: list[int] = field(default_factory=list)  # asks for what starts with the next tokens
    suffix: list[int] = field(default_factory=list)  # ends the request, begins the answer
    prefix: list[int] = field(default_factory=list)  # before the context: kept, not repeated


def render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """What a chat template makes of messages, within a bound of time and memory.

    Raises:
        UsageError: it fails, or does not come to an end.
    """
    try:
        _require_small_numbers(tokenizer.chat_template)
        with _bound(_TEMPLATE_S):
            return tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
    except Exception as error:  # whatever a template may raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"the chat template fails: {reason}; {_WITHOUT_CHAT}") from error


def _require_small_numbers(templates: str | dict[str, str]) -> None:
    """Refuse a template that one step of could keep a processor, or the memory, for itself.

    Such a step runs inside the interpreter, where `_bound` does not see it. No text needs one.

    Raises:
        ValueError: it raises numbers to a power, or has one above what any list or text needs.
    """
    from jinja2 import Environment

    for template in templates.values() if isinstance(templates, dict) else [templates]:
        for _, kind, text in Environment().lex(template):
            if kind == "operator" and text == "**":
                raise ValueError("it raises numbers to a power (**)")
            if kind in ("integer", "float") and literal_eval(text) > _LARGEST:
                raise ValueError(f"its number {text} is above {_LARGEST:,}")


@contextmanager
def _bound(seconds: float) -> Iterator[None]:
    """Stop Python code that runs for longer, or makes its process larger by a gigabyte.

    A template's loops are Python: a trace sees each of their lines, in any thread.
    """
    before, end, size = sys.gettrace(), monotonic() + seconds, _peak_bytes()

    def watch(frame: Any, event: str, argument: Any) -> Any:
        if monotonic() > end:
            raise TimeoutError(f"it has not ended after {seconds:g} seconds")
        if _peak_bytes() > size + (1 << 30):
            raise MemoryError("it needs more than 1 GiB")
        return watch

    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)


def _peak_bytes() -> int:
    """The largest size that this process ever had; 0 where the system does not say."""
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def frame(tokenizer: Any, chat: bool | None = None, system: str | None = None) -> Frame:
    """The frame to use: the chat template where there is one, unless told otherwise."""
    require_characters("system message", system or "")
    if chat is None:
        chat = bool(tokenizer.chat_template)
    if system is not None and not chat:
        raise UsageError("a system message needs the chat template; drop system= or chat=False")
    return Frame.chat(tokenizer, system) if chat else Frame.plain(tokenizer)


def encode(tokenizer: Any, around: Frame, context: str | Document, question: str) -> Prompt:
    """Token ids of both parts, as whoever looks at a prompt by hand wants them."""
    return encode_context(tokenizer, around, context).with_question(
        encode_question(tokenizer, around, question)
    )


def encode_context(
    tokenizer: Any, around: Frame, context: str | Document, room: int | None = None
) -> Prompt:
    """Token ids of a context and what stands before it; special tokens come from the frame alone.

    Args:
        room: tokens that there is room for; what needs more loses its middle (`encode_ends`).

    Raises:
        UsageError: the document has spans, and the tokenizer does not say where tokens begin; or
            as `encode_ends`.
    """
    document = _document(around, context)
    before, parts = _before(around), _parts(tokenizer, document)
    spans = join_spans(before, parts, len(around.before))
    cuts = _cuts(tokenizer, around, document.text, len(around.before))
    ids, spans = _encode(tokenizer, around.before + document.text, spans, cuts)
    if room is not None and len(ids) > room:
        return encode_ends(tokenizer, around, context, room)
    return Prompt(ids, [], spans)


def encode_ends(
    tokenizer: Any,
    around: Frame,
    context: str | Document,
    room: int,
    head: int | None = None,
) -> Prompt:
    """As `encode_context`, the middle of the context cut out to fit into `room` tokens.

    Args:
        head: tokens of the context in front of what is cut out; by default half of those left.

    Raises:
        UsageError: no token of the context fits in.
    """
    document = _document(around, context)
    first, before = _encode(tokenizer, around.before, _before(around))
    cuts = _cuts(tokenizer, around, document.text, 0)
    ids, spans = _encode(tokenizer, document.text, _parts(tokenizer, document), cuts)
    left = room - len(first)
    if left < 1:
        raise UsageError(
            f"what stands around the context and the answer leave {max(0, left)} tokens for the "
            "context; shorten the question, ask for fewer new tokens, or use a model with a "
            "longer window"
        )
    head = (left + 1) // 2 if head is None else min(head, left)
    if len(ids) > left:
        spans = without(spans, head, head + len(ids) - left)
    ids, spans = first + cut_middle(ids, left, head), join_spans(before, spans, len(first))
    return Prompt(ids, [], spans, cut=True)


def encode_question(tokenizer: Any, around: Frame, question: str) -> Prompt:
    """Token ids of a question that follows a context already read.

    Raises:
        UsageError: it holds half of a surrogate pair.
    """
    require_characters("question", question)
    start, text = len(around.between), around.between + question
    if around.trims_end:
        text = text.rstrip()
    parts: Spans = {"question": (((start, len(text)),),)} if text[start:] else {}
    cuts = _cuts(tokenizer, around, text[start:], start)
    ids, spans = _encode(tokenizer, text + around.after, parts, cuts)
    return Prompt([], ids, spans)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, special tokens in it included, none added."""
    return tokenizer(text, add_special_tokens=False).input_ids


def cut_middle(ids: list[int], length: int, head: int | None = None) -> list[int]:
    """The first and the last half of a list that is too long (LongBench's truncation).

    Args:
        head: how much of its beginning stays, by default half.
    """
    if len(ids) <= length:
        return ids
    head = (length + 1) // 2 if head is None else head
    return ids[:head] + ids[len(ids) - (length - head) :]


def repeat_words(tokenizer: Any, around: Frame) -> Words:
    """Token ids that ask for the repetition of a context.

    Source: KVzip, https://arxiv.org/abs/2505.23416, section 3.2.
    """
    whole = "\n\nRepeat the previous context exactly."
    part = "\n\nRepeat the part of the previous context exactly, starting with"
    return Words(
        first=encode_text(tokenizer, whole),
        later=encode_text(tokenizer, part),
        suffix=encode_text(tokenizer, around.after) if around.after else [],
        prefix=encode_text(tokenizer, around.before) if around.before else [],
    )


def _document(around: Frame, context: str | Document) -> Document:
    """A context as its frame takes it."""
    document = Document.of(context)
    return document.without_leading_blanks() if around.trims_start else document


def _before(around: Frame) -> Spans:
    """What stands before the context, as a named part."""
    return {"system": (((0, len(around.before)),),)} if around.before else {}


def _parts(tokenizer: Any, document: Document) -> Spans:
    """The named parts of a document, if the tokenizer can place them."""
    if document.spans and not tokenizer.is_fast:
        raise UsageError(
            "this tokenizer does not say where its tokens begin, so named spans cannot be found "
            "in its output; load the fast one (use_fast=True), or drop the spans"
        )
    return join_spans({"context": (((0, len(document.text)),),)}, document.parts(), 0)


def _cuts(tokenizer: Any, around: Frame, text: str, start: int) -> list[int]:
    """Where a text that begins at `start` has to be cut so that nothing in it is a special token.

    Whoever writes a prompt without a template writes its special tokens too.
    """
    return [start + cut for cut in inside_special(tokenizer, text)] if around.literal else []


def inside_special(tokenizer: Any, text: str) -> list[int]:
    """A place inside of everything in a text that would become a token of the template's."""
    template = str(tokenizer.chat_template or "")
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    names = {token.content for token in added if token.special or token.content in template}
    return sorted(
        {
            found.start() + 1
            for name in names
            if len(name) > 1 and name in text
            for found in re.finditer(f"(?={re.escape(name)})", text)
        }
    )


def encode_cut(tokenizer: Any, text: str, cuts: Sequence[int]) -> list[int]:
    """Token ids of a text, none of which reaches over a cut."""
    return _encode(tokenizer, text, {}, cuts)[0]


def _encode(
    tokenizer: Any, text: str, parts: Spans, cuts: Sequence[int] = ()
) -> tuple[list[int], Spans]:
    """Token ids of a text, and its parts in tokens; no parts from a tokenizer without offsets."""
    ids: list[int] = []
    places: list[tuple[int, int]] = []
    for start, end in pairwise([0, *cuts, len(text)]):
        if not tokenizer.is_fast:
            ids += encode_text(tokenizer, text[start:end])
            continue
        found = tokenizer(text[start:end], add_special_tokens=False, return_offsets_mapping=True)
        ids += found.input_ids
        places += [(start + begin, start + end) for begin, end in found.offset_mapping]
    if not tokenizer.is_fast:
        return ids, {}
    begins = [begin for begin, _ in places]
    spans = map_ends(parts, lambda at: bisect_left(begins, at))
    if "context" in spans and STRUCTURE not in spans:
        first, last = spans["context"][0][0] if spans["context"] else (0, 0)
        spans = {**spans, STRUCTURE: structure(text, ids, places, first, last)}
    return ids, spans
