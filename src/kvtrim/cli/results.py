"""The result of a command as JSON has it."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvtrim.api import Result


def record(result: "Result", question: str | None = None) -> dict[str, Any]:
    """A result as JSON has it; figures of the first answer on top."""
    record = asdict(result) | {
        name: getattr(result, name)
        for name in (
            "ttft_s",
            "tpot_s",
            "prompt_tokens",
            "read_tokens",
            "reused_tokens",
            "held_bytes",
            "full_bytes",
            "kept",
            "remark",
        )
    }
    if question is not None:
        record["question"] = question
    return record
