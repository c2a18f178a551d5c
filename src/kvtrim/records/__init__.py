"""What lies in the folder of a run: names of files, what their lines must hold, reading them.

Whoever reads a run reads it through here, so that a line that was damaged is one error that names
it, wherever it is met, and never a wrong figure.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Any,
    Final,
    Literal,
    NotRequired,
    TypedDict,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

from kvtrim import files
from kvtrim.errors import FileError, UsageError

RECORD: Final = "run.json"
INPUTS: Final = "inputs.jsonl"
SAMPLES: Final = "samples.jsonl"
TIMES: Final = "times.jsonl"
SCORES: Final = "scores.jsonl"
SPEED: Final = "speed.jsonl"
OK, REFUSED, OOM, FAILED = "ok", "refused", "oom", "failed"
"""What came of a line; where there is no figure, whether kvtrim said no, memory ran out, or
something else went wrong."""
NEEDS_PERMISSION = "needs --allow-code-execution"
"""There is an answer, and no score, since code was not allowed to run."""
BEGUN, SKIPPED, ENDED, UNFINISHED = "begun", "skipped", "ended", "unfinished"
"""Of measurements within a given time: one that was begun and has no other line ended its process;
one that is unfinished goes on another time."""

Line = dict[str, Any]
Kinds = Mapping[str, tuple[type, ...]]


class Key(TypedDict):
    """What tells the lines of an evaluation apart."""

    task: str
    sample: str
    method: str  # its label
    keep: str  # "" for the full cache
    protocol: str


class InputLine(TypedDict):
    """What was asked: one sample."""

    task: str
    sample: str
    group: dict[str, Any]
    answers: NotRequired[list[str]]
    prefix: NotRequired[str]
    extra: NotRequired[dict[str, Any]]
    context_tokens: NotRequired[int]
    question_tokens: NotRequired[int]
    truncated: NotRequired[bool]
    sha256: NotRequired[str]  # of the prompt's token ids


class SampleLine(Key):
    """What one method and budget made of one sample."""

    answer: NotRequired[str | None]
    new_tokens: NotRequired[int | None]
    stopped: NotRequired[str]
    held_bytes: NotRequired[float | None]
    full_bytes: NotRequired[float | None]
    entries: NotRequired[float | None]
    prompt_tokens: NotRequired[int | None]
    loss: NotRequired[float | None]
    kl: NotRequired[float | None]
    outcome: str
    reason: NotRequired[str | None]


class Times(TypedDict, total=False):
    """Seconds: a share where several rows went through one pass."""

    prefill_s: float | None
    evict_s: float | None
    observed: bool
    decode_s: float


class TimeLine(Key, Times):
    """How long one sample took."""


class ScoreLine(Key):
    """What an answer is worth, 0 to 1."""

    score: float | None
    metric: NotRequired[str]
    outcome: NotRequired[str]


class StepTimes(TypedDict):
    """Seconds of decoding steps behind a prompt."""

    token_s: float
    median_step_s: float
    captured: bool
    capture_s: float


class HeldFigures(TypedDict):
    """What a cache held after a prompt."""

    held_bytes: int
    entries: float
    full_bytes: int | None  # a peer cannot tell


class SpeedFigures(TypedDict, total=False):
    """What one turn of a speed measurement gave: peaks, or seconds and what was held."""

    peak_bytes: float | None
    decode_peak_bytes: float | None
    ttft_s: float
    end_to_end_s: float
    token_s: float
    median_step_s: float
    captured: bool
    capture_s: float
    held_bytes: float
    entries: float
    full_bytes: float | None


class SpeedOutcome(SpeedFigures):
    """The same, or why there is nothing."""

    outcome: str
    reason: NotRequired[str]


class SpeedKey(TypedDict):
    """What tells the rows of a speed measurement apart."""

    batch: int
    length: int
    method: str  # its label
    keep: str  # "" for plain transformers


class SpeedLine(SpeedOutcome):
    """One turn of a speed measurement; old ones lack some of the key."""

    batch: NotRequired[int]
    length: NotRequired[int]
    method: str
    keep: NotRequired[str]
    round: NotRequired[int]


class Fitted(TypedDict):
    """Whether a batch went into the memory, and what it gave."""

    fits: bool
    reason: NotRequired[str]
    used_bytes: NotRequired[int]  # weights included
    held_bytes: NotRequired[int]
    token_s: NotRequired[float]
    tokens_per_s: NotRequired[float]
    captured: NotRequired[bool]


class BatchLine(SpeedKey, Fitted):
    """One try of a search for the largest batch; it stands in `speed.jsonl` as well, where `fits`
    tells it from others.
    """


class AgendaFigures(TypedDict, total=False):
    """What is known of a measurement within a given time."""

    limit_s: float  # after which it is ended
    at: float  # begun, in seconds since the epoch
    seconds: float
    estimate_s: float
    figures: dict[str, Any]
    reason: str


class AgendaLine(AgendaFigures):
    """The same, what has become of it, and where."""

    stage: str
    name: str
    outcome: str
    machine: dict[str, Any]


LINES: dict[str, Any] = {
    INPUTS: InputLine,
    SAMPLES: SampleLine,
    TIMES: TimeLine,
    SCORES: ScoreLine,
    SPEED: SpeedLine,
}
"""What the lines of each file are."""
EVAL: Kinds = {"model": (dict,), "tasks": (dict,), "protocol": (str,)}
TIMED: Kinds = {"model": (dict,), "machine": (dict,), "plan": (dict,), "limits": (dict,)}
"""What the record of an evaluation has, and that of a speed run."""
_REMEDY = "remove it and the lines behind it to have them measured again, or put back a copy"


@overload
def read(folder: Path, name: Literal["inputs.jsonl"]) -> list[InputLine]: ...
@overload
def read(folder: Path, name: Literal["samples.jsonl"]) -> list[SampleLine]: ...
@overload
def read(folder: Path, name: Literal["times.jsonl"]) -> list[TimeLine]: ...
@overload
def read(folder: Path, name: Literal["scores.jsonl"]) -> list[ScoreLine]: ...
@overload
def read(folder: Path, name: Literal["speed.jsonl"]) -> list[SpeedLine | BatchLine]: ...
def read(folder: Path, name: str) -> Any:
    """The lines of a run's file. Raises as `lines`."""
    return lines(folder / name)


def text_of(some: Iterable[Mapping[str, Any]]) -> bytes:
    """Lines as a file holds them."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in some).encode()


def key_of(line: Key) -> Key:
    """What tells a line of an evaluation from others."""
    return cast(Key, {name: line[name] for name in Key.__annotations__})


def by_sample(inputs: Iterable[InputLine], where: Path | str) -> dict[tuple[str, str], InputLine]:
    """What was asked, by task and sample.

    Raises:
        UsageError: two samples of a task have one id, so nothing says whose an answer is.
    """
    found: dict[tuple[str, str], InputLine] = {}
    for one in inputs:
        if one != found.setdefault((one["task"], one["sample"]), one):
            raise UsageError(
                f"{where} holds two samples {one['sample']!r} of {one['task']}, whose answers "
                "cannot be told apart; measure them again into another folder"
            )
    return found


def lines(path: Path, checked: bool = True) -> list[Line]:
    """The lines of a file of a run, none if it is not there; without a half line at its end.

    Args:
        checked: also that each holds what such a line must, not only that it is an object.

    Raises:
        FileError: a line is damaged; the message names it.
    """
    return list(_lines(path, checked)) if path.exists() else []


def first(path: Path) -> Line | None:
    """The first line, if there is one. Raises as `lines`."""
    return next(_lines(path), None) if path.exists() else None


def record(path: Path, kinds: Kinds | None = None) -> Line:
    """The record of a run.

    Raises:
        FileError: it cannot be read, or lacks what such a record has.
    """
    found = files.record_of(path)
    for name, kind in (kinds or {}).items():
        if not isinstance(found.get(name), kind):
            raise FileError("read", path, f"it has no {name!r}: it is damaged, or of another run")
    if kinds is not None and not isinstance(found["model"].get("name"), str):
        raise FileError("read", path, "its model has no name: it is damaged")
    return found


@cache
def _kinds(kind: Any) -> Kinds:
    """Of what kinds each value of a line may be, as JSON has it."""
    hints = get_type_hints(kind)
    return {
        name: tuple(one for each in _each(hint) for one in each) for name, hint in hints.items()
    }


def _each(hint: Any) -> Iterator[tuple[type, ...]]:
    for option in get_args(hint) if isinstance(hint, UnionType) else (hint,):
        bare = get_origin(option) or option
        yield (int, float) if bare in (int, float) else (bare or NoneType,)


def _kind(name: str, line: Line) -> Any:
    """What a line of a file is; None of a file that has no kind."""
    return BatchLine if name == SPEED and "fits" in line else LINES.get(name)


def _damage(kind: Any, line: Line) -> str | None:
    """The first value of a line that is not what it must be, if there is one."""
    kinds = _kinds(kind)
    wrong = [name for name in kinds if name in kind.__required_keys__ and name not in line]
    wrong += [name for name in kinds if name in line and not isinstance(line[name], kinds[name])]
    return next(iter(wrong), None)


def _lines(path: Path, checked: bool = True) -> Iterator[Line]:
    try:
        for number, line in files.lines_of(path):
            kind = _kind(path.name, line) if checked else None
            wrong = None if kind is None else _damage(kind, line)
            if wrong is not None:
                raise FileError("read", f"{path}:{number}", f"its {wrong!r} is damaged")
            yield line
    except FileError as error:
        raise error.with_remedy(_REMEDY) from None
