"""What an evaluation is asked for beside tasks, methods and budgets, said once.

The options of `eval`, the keys of a sweep's file and the fields of `run.json` are these fields: an
option more is a field here, an option in `cli/eval.py`, and whatever acts on it.
"""

from dataclasses import dataclass, field, fields
from types import UnionType
from typing import Any, Literal, get_args, get_type_hints

from kvtrim.errors import UsageError

AWARE: Literal["question-aware"] = "question-aware"
AGNOSTIC: Literal["question-agnostic"] = "question-agnostic"
PROTOCOLS = AWARE, AGNOSTIC
BATCH = 16
"""Answers generated together, where nothing else was asked for."""


def _at_least(least: int, default: int | None = None) -> Any:
    return field(default=default, metadata={"least": least})


@dataclass(frozen=True, kw_only=True)
class EvalSpec:
    """Options of an evaluation, as plain values that go to any process.

    Raises:
        UsageError: a value that an option cannot have.
    """

    protocol: str = AWARE
    limit: int | None = _at_least(1)  # samples per task
    length: int | None = _at_least(1)  # tokens of a prompt
    seed: int = 0
    batch: int = _at_least(1, 1)  # answers that are generated together
    fitting: bool = False  # samples that would have to be cut are left out
    max_new_tokens: int | None = _at_least(1)  # bound of answers, below a task's own or above it
    chat: bool | None = None  # the chat template, whatever a task says of it
    truncate_at: int | None = _at_least(16)  # tokens of a bare prompt above which its middle goes
    prefill_chunk: int | None = _at_least(1)  # tokens of a pass, where a method cuts after each

    def __post_init__(self) -> None:
        """Refuse values of the wrong kind or out of range."""
        if self.protocol not in PROTOCOLS:
            raise UsageError(f"protocol = {self.protocol!r}: use {' or '.join(PROTOCOLS)}")
        for name in OPTIONS:
            require(name, getattr(self, name))

    def options(self) -> dict[str, Any]:
        """Every option by its name, in the order of a record."""
        return {name: getattr(self, name) for name in OPTIONS}


OPTIONS = tuple(each.name for each in fields(EvalSpec))
"""The names of all options."""
SHARED = tuple(name for name in OPTIONS if name not in ("protocol", "length"))
"""Those that all jobs of a sweep share; of the others it has lists."""


def require(name: str, value: Any) -> None:
    """Refuse a value that an option cannot have.

    Raises:
        UsageError: naming what it may be.
    """
    (each,) = [each for each in fields(EvalSpec) if each.name == name]
    hint = get_type_hints(EvalSpec)[name]
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    least = each.metadata.get("least")
    if type(value) not in kinds:  # true is no number here
        wanted = {bool: "true or false", str: "text in quotes"}.get(kinds[0], "a whole number")
    elif value is not None and least is not None and value < least:
        wanted = "a whole number"
    else:
        return
    raise UsageError(
        f"{name} = {value!r}: use {wanted}{'' if least is None else f' of at least {least}'}"
    )
