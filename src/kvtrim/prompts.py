"""From a context and a question to token ids, once for both protocols. Knows nothing of models.

The two parts are tokenised separately, so the ids are the same whether the question is read
together with the context (question-aware) or after it was compressed (question-agnostic).
"""

from dataclasses import dataclass, field
from typing import Any

from kvtrim.errors import UsageError

_CONTEXT, _QUESTION = "\u2980context\u2980", "\u2980question\u2980"
_BETWEEN = "\n\n"


@dataclass(frozen=True)
class Frame:
    """The text around a context and a question: chat template, special tokens, separators."""

    before: str
    between: str
    after: str

    @classmethod
    def chat(cls, tokenizer: Any, system: str | None = None) -> "Frame":
        """The tokenizer's chat template around one user message "context, blank line, question".

        Raises:
            UsageError: the tokenizer has no chat template, or one that changes the message.
        """
        if not tokenizer.chat_template:
            raise UsageError("this tokenizer has no chat template; use chat=False (--no-chat)")
        messages = [{"role": "user", "content": f"{_CONTEXT}{_BETWEEN}{_QUESTION}"}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before, found, rest = text.partition(_CONTEXT)
        between, also_found, after = rest.partition(_QUESTION)
        if not (found and also_found):
            raise UsageError(
                "the chat template alters the user's message; use chat=False (--no-chat)"
            )
        return cls(before, between, after)

    @classmethod
    def plain(cls, tokenizer: Any) -> "Frame":
        """No template: the start token if the tokenizer sets one, the context, the question."""
        starts = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
        return cls(tokenizer.bos_token if starts else "", _BETWEEN, "")


@dataclass(frozen=True)
class Prompt:
    """A context and a question as token ids; either may be encoded alone."""

    context: list[int]
    question: list[int]

    def __len__(self) -> int:
        return len(self.context) + len(self.question)


@dataclass(frozen=True)
class Words:
    """What stands around the repeated text, as token ids; nothing by default."""

    first: list[int] = field(default_factory=list)  # asks for the whole context
    later: list[int] = field(default_factory=list)  # asks for what starts with the next tokens
    suffix: list[int] = field(default_factory=list)  # ends the request, begins the answer
    prefix: list[int] = field(default_factory=list)  # before the context: kept, not repeated


def frame(tokenizer: Any, chat: bool | None = None, system: str | None = None) -> Frame:
    """The frame to use: the chat template where there is one, unless told otherwise."""
    if chat is None:
        chat = bool(tokenizer.chat_template)
    if system is not None and not chat:
        raise UsageError("a system message needs the chat template; drop system= or chat=False")
    return Frame.chat(tokenizer, system) if chat else Frame.plain(tokenizer)


def encode(tokenizer: Any, around: Frame, context: str, question: str) -> Prompt:
    """Token ids of both parts. Special tokens come from the frame alone, never twice."""
    return Prompt(
        context=encode_text(tokenizer, around.before + context),
        question=encode_question(tokenizer, around, question),
    )


def encode_question(tokenizer: Any, around: Frame, question: str) -> list[int]:
    """Token ids of a question that follows a context already read."""
    return encode_text(tokenizer, around.between + question + around.after)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, special tokens in it included, none added."""
    return tokenizer(text, add_special_tokens=False).input_ids


def cut_middle(ids: list[int], length: int) -> list[int]:
    """The first and the last half of a list that is too long (LongBench's truncation)."""
    if len(ids) <= length:
        return ids
    head = (length + 1) // 2
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
