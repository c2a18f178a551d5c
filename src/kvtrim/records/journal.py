"""A run folder: what was asked for and where, before the first figure; then a line per figure.

`run.json` is the record, `speed.jsonl` (or another name) the journal. A line that was cut off in
the middle does not count, so a run that was killed goes on with the figure that it was at.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kvtrim import files, records
from kvtrim.errors import FileError, UsageError
from kvtrim.records import RECORD, SPEED

try:
    import fcntl
except ImportError:  # not a Unix: two processes in one folder are not noticed
    fcntl = None

_GO_ON = "make room and ask for the same again: it goes on where it stopped"
_MAY_DIFFER = ("date", "commit", "dirty", "limits")  # the code itself is compared by its hash
_SHOWN = 4  # differences that a message lists

Key = dict[str, Any]


class Journal:
    """Lines that were written, and writing more; in memory alone without a file.

    Raises:
        FileError: a line of it is damaged.
    """

    def __init__(self, path: Path | None = None):
        self._path = path
        self.lines: list[dict[str, Any]] = [] if path is None else _whole_lines(path)

    def add(self, line: Mapping[str, Any]) -> None:
        """Write one line through to the disk. Raises as `extend`."""
        self.extend([line])

    def extend(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write lines through to the disk: all of them, or none.

        Raises:
            FileError: the disk is full, or the file cannot be written to; what was written before
                is still there.
        """
        if self._path is not None:
            try:
                files.extend(self._path, records.text_of(lines))
            except FileError as error:
                raise error.with_remedy(_GO_ON) from error
        self.lines += map(dict, lines)

    def cut(self, count: int) -> None:
        """Drop all but the first lines."""
        if self._path is not None and len(self.lines) > count:
            with files.file_errors("read", self._path), self._path.open("rb") as file:
                size = sum(len(next(file)) for _ in range(count))
            files.truncate(self._path, size)
        del self.lines[count:]

    def holds(self, key: Key) -> bool:
        """Whether there is a line with these values."""
        return any(key.items() <= line.items() for line in self.lines)


@contextmanager
def open_run(
    folder: Path, record: dict[str, Any], lines: str = SPEED, name: str = RECORD
) -> Iterator[tuple[Journal, dict[str, Any]]]:
    """Begin a run in a folder, or go on with the one that lies there, alone until it is closed.

    A run that was refused or killed before its first line is none to go on with: what is asked for
    now takes its place.

    Yields:
        The journal `lines`, and the record `name` as it was first written.

    Raises:
        UsageError: the folder holds another run, or another process measures there.
        FileError: it cannot be written to, or what lies there is damaged.
    """
    files.require_place(folder)
    if not folder.exists():
        files.make_folder(folder)
    with lock(folder):
        there = _record_there(folder, json.loads(json.dumps(record)), lines, name)
        yield Journal(folder / lines), there


def begin(
    folder: Path, record: dict[str, Any], lines: str = SPEED, name: str = RECORD
) -> dict[str, Any]:
    """As `open_run` for a run whose lines are written elsewhere; gives its record."""
    with open_run(folder, record, lines, name) as (_, there):
        return there


def _record_there(folder: Path, record: dict[str, Any], lines: str, name: str) -> dict[str, Any]:
    path = folder / name
    if path.exists() and (_has_lines(folder, lines) or _holds(path, record)):
        return _same(folder, records.record(path), record)
    if (folder / lines).exists() and not path.exists():
        raise UsageError(f"{folder} holds {lines} without {name}; name another folder")
    files.replace(path, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
    return record


def _holds(path: Path, record: dict[str, Any]) -> bool:
    with suppress(FileError):
        return not _differences("", records.record(path), record)
    return False


def _has_lines(folder: Path, lines: str) -> bool:
    """Whether there is a line in the folder, or in one of its folders."""
    with files.file_errors("read", folder):
        return any(path.stat().st_size for path in folder.rglob(lines))


@contextmanager
def lock(folder: Path, wait: bool = False) -> Iterator[None]:
    """No other process measures in the folder. The system takes the lock back when one ends.

    Raises:
        UsageError: another does, and is not waited for.
    """
    if fcntl is None:  # not a Unix
        yield
        return
    with files.file_errors("read", folder):
        lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UsageError(
                f"another process is measuring in {folder}; wait for it, or name another folder"
            ) from None
        yield
    finally:
        os.close(lock)


def _same(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
    """The record there, if it is of the same run."""
    found = _differences("", there, here)
    if found:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise UsageError(
            f"{folder} holds another run: {'; '.join(found[:_SHOWN])}{more}. To go on with it, "
            "ask for the same with the same versions on the same machine; else name another "
            "folder with --out"
        )
    return there


def _differences(name: str, there: Any, here: Any) -> list[str]:
    """Readable differences between two records: "machine.threads: 1 there, 2 here"."""
    if there == here:
        return []
    if not isinstance(there, dict) or not isinstance(here, dict):
        return [f"{name}: {there} there, {here} here"]
    found = []
    for key in dict.fromkeys([*there, *here]):
        if key not in _MAY_DIFFER:
            inner = f"{name}.{key}" if name else key
            found += _differences(inner, there.get(key), here.get(key))
    return found


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal; one that was cut off in the middle is taken out of the file."""
    found = records.lines(path, checked=False)
    if path.exists():
        with files.file_errors("read", path):
            content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            files.truncate(path, whole)
    return found
