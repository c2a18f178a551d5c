"""A conversation to token ids, the template's special tokens apart from everybody's text.

Messages are text: what looks like a special token in them is spelled out, unless somebody says
otherwise. The ids come in two parts, up to a place in the first user message and from there on,
tokenised separately, so that the first part is the same whatever follows it.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from kvtrim.errors import UsageError
from kvtrim.prompts.document import require_characters
from kvtrim.prompts.prompt import encode_cut, inside_special, render

_BETWEEN = "\n\n"


@dataclass(frozen=True)
class Conversation:
    """Token ids of messages, the answer's beginning included."""

    head: list[int]  # up to the end of the first user message's text, or of a document before it
    rest: list[int]


def encode(
    tokenizer: Any,
    messages: Sequence[Mapping[str, str]],
    *,
    after_document: bool = False,
    special: bool = False,
) -> Conversation:
    """Messages under the tokenizer's chat template.

    Args:
        messages: each with `role` and `content`.
        after_document: the first user message follows a document that was read in the same
            message, which `kvtrim.compress` put there; `rest` begins behind the document, and
            there is no head. System messages then stand before the question.
        special: special tokens in messages act as such.

    Raises:
        UsageError: no template, no user message where one has to be, or a template that alters
            or refuses the messages.
    """
    if not tokenizer.chat_template:
        raise UsageError("this model's tokenizer has no chat template; use completions instead")
    if not messages:
        raise UsageError("there are no messages; send at least one of the user's")
    given = [{"role": each["role"], "content": each["content"]} for each in messages]
    for each in given:
        require_characters(f"{each['role']} message", each["content"])
    given = _below_document(given) if after_document else given
    mark = f"\u2980{secrets.token_hex(8)}"  # which no message holds, and no template strips
    place, cut = f"{mark}:\u2981", f"{mark}|\u2981"
    marked = [
        {**each, "content": each["content"] if special else _cut(tokenizer, each["content"], cut)}
        for each in given
    ]
    first = next((n for n, each in enumerate(given) if each["role"] == "user"), len(given) - 1)
    own = marked[first]["content"]
    end = len(own.rstrip())  # a template may trim what follows
    marked[first]["content"] = (
        f"{place}{_BETWEEN}{own}" if after_document else f"{own[:end]}{place}{own[end:]}"
    )
    text = render(tokenizer, marked)
    if text.count(place) != 1:
        raise UsageError("the chat template alters the user's message; use completions instead")
    head, _, rest = (_whole(part, cut) for part in text.partition(place))
    ids = [] if after_document else encode_cut(tokenizer, *head)
    return Conversation(ids, encode_cut(tokenizer, *rest))


def encode_plain(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    """A text without a template, behind the start token if the tokenizer sets one."""
    require_characters("prompt", text)
    starts = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    own = [tokenizer.bos_token_id] if starts else []
    return own + encode_cut(tokenizer, text, [] if special else inside_special(tokenizer, text))


def _below_document(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The system's words before the first question: the document's own prompt stands above."""
    system = [each["content"] for each in messages if each["role"] in ("system", "developer")]
    others = [each for each in messages if each["role"] not in ("system", "developer")]
    if not others or others[0]["role"] != "user":
        raise UsageError("the first message to a document has to be the user's")
    asked = _BETWEEN.join([*system, others[0]["content"]])
    return [{"role": "user", "content": asked}, *others[1:]]


def _cut(tokenizer: Any, text: str, cut: str) -> str:
    """A text with a mark inside everything that would become a special token."""
    for place in reversed(inside_special(tokenizer, text)):
        text = text[:place] + cut + text[place:]
    return text


def _whole(text: str, cut: str) -> tuple[str, list[int]]:
    """The text without its marks, and where they stood."""
    pieces = text.split(cut)
    return "".join(pieces), list(accumulate(map(len, pieces[:-1])))
