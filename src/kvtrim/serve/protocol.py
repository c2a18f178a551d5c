"""What clients may ask over HTTP, in the words of OpenAI's API; every size is bounded."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_CHOICES = 8
MOST_MESSAGES = 1024
LONGEST = 16 << 20  # characters of a document, a message or a prompt


class Kvtrim(BaseModel):
    """What plain clients say in `extra_body={"kvtrim": {...}}`."""

    model_config = ConfigDict(extra="forbid")

    method: str | None = Field(None, max_length=200)
    keep: str | int | float | None = None
    settings: dict[str, str | int | float | bool] = Field(default_factory=dict, max_length=32)
    special_tokens: bool = False  # those in messages act as such
    compress: bool | None = None  # the first message: whatever its length, or not at all


class Message(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]] | None = Field(max_length=LONGEST)

    def text(self) -> str:
        """Its text; parts of other kinds are refused.

        Raises:
            ValueError: naming the kind.
        """
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        for part in self.content:
            kind = part.get("type")
            if kind not in ("text", "input_text", "output_text"):
                raise ValueError(f"content of type {kind!r:.40} cannot be read; send text")
            if not isinstance(part.get("text"), str):
                raise ValueError("a part of type text has to hold text")
        return "".join(part["text"] for part in self.content)


class StreamOptions(BaseModel):
    """Of a streamed answer."""

    include_usage: bool | None = None


class Asked(BaseModel):
    """What every kind of request says of the answer.

    Words of OpenAI's that are not known here are passed over, but not those that ask for another
    answer than would be given.
    """

    model_config = ConfigDict(extra="ignore")

    model: str = Field(max_length=200)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    kvtrim: Kvtrim = Kvtrim.model_validate({})
    logit_bias: dict[str, float] | None = None
    best_of: int | None = None
    tool_choice: Any = None
    function_call: Any = None
    response_format: Any = None
    text: Any = None  # of a response: its format

    @model_validator(mode="after")
    def require_served(self) -> "Asked":
        """Refuse what an answer here would not keep."""
        format = self.text.get("format") if isinstance(self.text, dict) else None
        wrong = {
            "logit_bias": bool(self.logit_bias),
            "best_of": (self.best_of or 1) > (self.n or 1),
            "tool_choice": self.tool_choice not in (None, "none", "auto"),
            "function_call": self.function_call not in (None, "none", "auto"),
            "response_format": self.response_format not in (None, {"type": "text"}),
            "text.format": format not in (None, {"type": "text"}),
        }
        for name in (name for name, refused in wrong.items() if refused):
            raise ValueError(f"{name} is not served here; leave it out")
        return self


class Chat(Asked):
    """`/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class Completion(Asked):
    """`/v1/completions`."""

    prompt: str | list[str] | list[int] = Field(max_length=LONGEST)
    max_tokens: int | None = None
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None


class Response(Asked):
    """`/v1/responses`."""

    input: str | list[Message] = Field(max_length=LONGEST)
    instructions: str | None = Field(None, max_length=LONGEST)
    max_output_tokens: int | None = None
    previous_response_id: str | None = None


class NewDocument(BaseModel):
    """`POST /v1/documents`."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=200)
    text: str = Field(max_length=LONGEST)
    method: str | None = Field(None, max_length=200)
    keep: str | int | float | None = None
    settings: dict[str, str | int | float | bool] = Field(default_factory=dict, max_length=32)
    wait: bool = False
