"""`llm -m kvtrim/smollm2@manual "..."`: a plugin of Simon Willison's `llm`.

The model and every document of the library are models of `llm`, answered in its own process.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import llm
from pydantic import Field

from kvtrim.serve.library import Library, default_folder

_EMBEDDED = "smollm2"


@llm.hookimpl
def register_models(register: Callable[[llm.Model], None]) -> None:
    """The embedded model, and one for each named document."""
    register(Kvtrim(_EMBEDDED, None))
    for entry in Library(default_folder()).entries()[0]:
        register(Kvtrim(entry.model, entry.name))


@cache
def _load(model: str) -> tuple[Any, Any]:
    from kvtrim.hf.models.load import load

    return load(model)


class Kvtrim(llm.Model):
    """A model, or one of its documents."""

    can_stream = True

    class Options(llm.Options):  # pyright: ignore[reportIncompatibleVariableOverride]
        """How an answer's tokens are chosen."""

        max_tokens: int = Field(default=512, ge=1, description="Longest answer")
        temperature: float = Field(default=0.0, ge=0, le=10, description="0: greedy")
        top_p: float = Field(default=1.0, gt=0, le=1, description="Of sampling")
        seed: int | None = Field(default=None, description="Of sampling")

    def __init__(self, model: str, document: str | None):
        self._model, self._document = model, document
        name = model.rstrip("/").rpartition("/")[2]
        self.model_id = f"kvtrim/{name}" if document is None else f"kvtrim/{name}@{document}"

    def __str__(self) -> str:
        return f"kvtrim: {self.model_id}"

    def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.Response,
        conversation: llm.Conversation | None,
    ) -> Iterator[str]:
        """Pieces of the answer as they come."""
        from kvtrim.serve.talk import Talk

        model, tokenizer = _load(self._model)
        talk = Talk.of(model, tokenizer, self._model, Library(default_folder()), self._document)
        earlier: list[Any] = list(conversation.responses) if conversation is not None else []
        for turn in earlier:
            talk.messages += [
                {"role": "user", "content": turn.prompt.prompt or ""},
                {"role": "assistant", "content": turn.text()},
            ]
        if prompt.system:
            talk.messages.insert(0, {"role": "system", "content": prompt.system})
        yield from talk.ask(prompt.prompt or "", **prompt.options.model_dump())
