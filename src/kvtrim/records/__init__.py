"""What lies in the folder of a run: names of files, what their lines must hold, reading them.

Whoever reads a run reads it through here, so that a line that was damaged is one error that names
it, wherever it is met, and never a wrong figure.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvtrim import files
from kvtrim.errors import FileError

RECORD, SPEED = "run.json", "speed.jsonl"
INPUTS, SAMPLES, TIMES, SCORES = "inputs.jsonl", "samples.jsonl", "times.jsonl", "scores.jsonl"
OK, REFUSED, OOM = "ok", "refused", "oom"
"""What came of a line; where there is no figure, whether kvtrim said no or memory ran out."""

Line = dict[str, Any]
Kinds = Mapping[str, tuple[type, ...]]

_TEXT, _FIGURE, _NONE = (str,), (int, float), type(None)
_KEY: Kinds = dict.fromkeys(("task", "sample", "method", "keep", "protocol"), _TEXT)
LINES: dict[str, Kinds] = {
    INPUTS: {"task": _TEXT, "sample": _TEXT, "group": (dict,)},
    SAMPLES: {**_KEY, "outcome": _TEXT},
    TIMES: _KEY,
    SCORES: {**_KEY, "score": (*_FIGURE, _NONE)},
    SPEED: {"method": _TEXT, "outcome": _TEXT},
}
"""What every line of a file has."""
WHERE_THERE: dict[str, Kinds] = {
    INPUTS: {"answers": (list,), "prefix": _TEXT, "extra": (dict,), "truncated": (bool,)},
    SAMPLES: {
        **dict.fromkeys(("answer", "reason"), (str, _NONE)),
        **dict.fromkeys(("loss", "kl", "held_bytes", "full_bytes"), (*_FIGURE, _NONE)),
        **dict.fromkeys(("entries", "prompt_tokens", "new_tokens"), (*_FIGURE, _NONE)),
    },
    SCORES: {"outcome": _TEXT, "metric": _TEXT},
    SPEED: dict.fromkeys(("batch", "length", "round"), _FIGURE),
}
"""What a line may have, and of what kind it is then."""
EVAL: Kinds = {"model": (dict,), "tasks": (dict,), "protocol": _TEXT}
TIMED: Kinds = {"model": (dict,), "machine": (dict,), "plan": (dict,), "limits": (dict,)}
"""What the record of an evaluation has, and that of a speed run."""
_REMEDY = "remove it and the lines behind it to have them measured again, or put back a copy"


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


def _lines(path: Path, checked: bool = True) -> Iterator[Line]:
    name = path.name if checked else ""
    needed, known = LINES.get(name, {}), WHERE_THERE.get(name, {})
    try:
        for number, line in files.lines_of(path):
            wrong = [name for name in needed if name not in line]
            kinds = {**needed, **known}
            wrong += [n for n in kinds if n in line and not isinstance(line[n], kinds[n])]
            if wrong:
                raise FileError("read", f"{path}:{number}", f"its {wrong[0]!r} is damaged")
            yield line
    except FileError as error:
        raise error.with_remedy(_REMEDY) from None
