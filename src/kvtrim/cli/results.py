"""Running `kvtrim.generate` for a command, and its result as JSON has it."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvtrim.api import Result


def generate(
    model: Any,
    tokenizer: Any,
    context: Any,
    questions: list[str],
    method: str,
    keep: str,
    settings: dict[str, Any],
    how: dict[str, Any],
    report: Any,
) -> "Result":
    """Answers under one method; `how` holds the options that all methods share."""
    from kvtrim.api import generate as run

    return run(
        model,
        tokenizer,
        context,
        questions,
        method=method,
        keep=keep,
        progress=report,
        **how,
        **settings,
    )


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
