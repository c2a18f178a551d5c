"""Reading and writing files so that nobody meets half of one, or anything but a file.

Whatever a disk, a mode or somebody's editor does to them is a `FileError`, which says which file.
"""

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kvtrim.errors import FileError, UsageError

try:
    import fcntl
except ImportError:  # not a Unix: leftovers of a writer that was killed stay
    fcntl = None

_MOST = 0o666  # the mode of a new file, before the umask
_DEEPEST = 100  # lists and objects in one another; nothing of ours has ten
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # how JSON spells half of a surrogate pair

# Writing


def replace(path: Path, content: bytes) -> None:
    """Write a file; an older file is replaced only once the new one is complete.

    Raises:
        FileError: as `replacement`.
    """
    with replacement(path) as partial:
        partial.write_bytes(content)


@contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """A file to write to instead, which takes the other's place if the block succeeds.

    A new file has the mode that the umask leaves, one that is replaced keeps its own; a link stays
    and leads to the new file. While it is written nobody else can read it. What a killed writer
    left behind is removed when the same file is written again.

    Raises:
        FileError: the folder cannot be written to, the disk is full, or something lies there that
            is not a file.
    """
    with file_errors("write", path):
        target = _target(path)
        mode = _mode(target)
        with _beside(target) as folder:
            partial = folder / target.name
            yield partial
            _settle(partial, mode)
            os.replace(partial, target)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill instead, which takes its place if the block succeeds; else there is none.

    What a killed process left behind is removed when the same folder is made again.

    Raises:
        FileError: its place cannot be written to, or is taken.
    """
    with file_errors("write", path), _beside(path) as folder:
        partial = folder / path.name
        partial.mkdir(mode=0o755)
        yield partial
        os.replace(partial, path)


def replace_with_record(path: Path, content: bytes, about: Path, record: dict[str, Any]) -> None:
    """Write a file and beside it its record, with its SHA-256; older ones are replaced only once
    both are complete.

    Raises:
        FileError: as `replacement`.
    """
    whole = record | {"sha256": hashlib.sha256(content).hexdigest()}
    with replacement(about) as beside, replacement(path) as partial:
        beside.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        partial.write_bytes(content)


def extend(path: Path, content: bytes) -> None:
    """Write to the end of a file and through to the disk: all of it, or nothing.

    Raises:
        FileError: the disk is full, or the file cannot be written to; it is as it was before.
    """
    with file_errors("write", path):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, _MOST)
        try:
            before = os.fstat(file).st_size
            try:
                rest = memoryview(content)
                while rest:
                    rest = rest[os.write(file, rest) :]
                os.fsync(file)
            except BaseException:
                os.ftruncate(file, before)
                raise
        finally:
            os.close(file)


def truncate(path: Path, size: int) -> None:
    """Cut off the end of a file.

    Raises:
        FileError: it cannot be written to.
    """
    with file_errors("write", path):
        os.truncate(path, size)


def require_place(folder: Path, named: str = "") -> None:
    """Refuse a folder that cannot be made.

    Args:
        named: how another one is named, for people to read: " with --out".

    Raises:
        UsageError: its place is missing, or taken by a file.
    """
    if not folder.parent.is_dir():
        raise UsageError(f"cannot write {folder}: there is no folder {folder.parent}")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; name a folder{named}")


def make_folder(path: Path, parents: bool = False) -> None:
    """A folder that things can be written into, if it is not there yet.

    Raises:
        FileError: its place is closed, missing, or taken by a file; or it is closed itself.
    """
    with file_errors("write", path):
        path.mkdir(exist_ok=True, parents=parents)
        if not os.access(path, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, "the folder is not writable")


@contextmanager
def file_errors(doing: str, path: Path | str) -> Iterator[None]:
    """What the system says of a file, as a `FileError` that names it."""
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        raise FileError(doing, path, error) from error


# Reading


def text_of(path: Path, streams: bool = False) -> str:
    """What stands in a file.

    Args:
        streams: a pipe will do as well, such as a shell makes of `<(command)`.

    Raises:
        FileError: it cannot be read, or is no text.
    """
    try:
        return _content(path, streams).decode()
    except UnicodeDecodeError as error:
        raise FileError("read", path, f"it is not UTF-8 text ({error})") from None


def json_of(path: Path) -> Any:
    """The JSON in a file.

    Raises:
        FileError: it cannot be read, or is no JSON.
    """
    text = text_of(path)
    try:
        return parse(text)
    except ValueError as error:
        raise FileError("read", path, f"it is not JSON ({error})") from None


def record_of(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileError: it cannot be read, or is no JSON object.
    """
    found = json_of(path)
    if not isinstance(found, dict):
        raise FileError("read", path, "it holds no JSON object")
    return found


def lines_of(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects in a file of one a line, numbered from 1; without a half line at its end.

    Raises:
        FileError: it cannot be read, or a line is no JSON object; the message names the line.
    """
    whole, _, _ = _content(path).rpartition(b"\n")
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            found = parse(line.decode())
        except ValueError as error:
            raise FileError("read", f"{path}:{number}", f"this is not JSON ({error})") from None
        if not isinstance(found, dict):
            raise FileError("read", f"{path}:{number}", "this is no JSON object")
        yield number, found


def toml_of(path: Path) -> dict[str, Any]:
    """The TOML in a file.

    Raises:
        FileError: it cannot be read, or is no TOML.
    """
    text = text_of(path, streams=True)
    try:
        found = tomllib.loads(text)
        _require_shallow(found)
    except RecursionError:
        raise FileError("read", path, "it is nested too deep") from None
    except ValueError as error:
        raise FileError("read", path, f"it is no TOML ({error})") from None
    return found


def parse(text: str) -> Any:
    """JSON that anybody may have touched: whatever is wrong with it is a `ValueError`.

    Raises:
        ValueError: no JSON, nested too deep, a number too long, or half of a surrogate pair,
            which JSON can spell and no file can hold.
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    _require_shallow(found)
    if _HALF.search(text):
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise ValueError(f"half of a surrogate pair, {half}, is no text") from None
    return found


def _content(path: Path, streams: bool = False) -> bytes:
    with file_errors("read", path):
        kind = os.stat(path).st_mode
        if stat.S_ISDIR(kind):
            raise OSError(errno.EISDIR, "it is a folder")
        if not stat.S_ISREG(kind) and not (streams and stat.S_ISFIFO(kind)):  # may never end
            raise OSError(errno.EINVAL, "it is not a regular file")
        return path.read_bytes()


def _require_shallow(found: Any) -> None:
    level, depth = [[found]], 0
    while level:
        if depth > _DEEPEST:
            raise ValueError("it is nested too deep")
        inner = (one.values() if isinstance(one, dict) else one for one in level)
        level = [each for one in inner for each in one if isinstance(each, dict | list)]
        depth += 1


# What happens beside a file while it is written


def _target(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _mode(target: Path) -> int:
    """The mode that a file there is to have.

    Raises:
        OSError: something else lies there.
    """
    try:
        there = os.lstat(target).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return _MOST & ~_umask()
    if stat.S_ISDIR(there):
        raise OSError(errno.EISDIR, "it is a folder")
    if not stat.S_ISREG(there):
        raise OSError(errno.EINVAL, "it is not a regular file")
    return stat.S_IMODE(there)


def _umask() -> int:
    """Linux says it without changing it, which other threads would notice."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    before = os.umask(0o077)
    os.umask(before)
    return before


def _settle(partial: Path, mode: int) -> None:
    """Everything on the disk, under the mode that it is to have."""
    file = os.open(partial, os.O_RDWR)
    try:
        os.fsync(file)
    finally:
        os.close(file)
    os.chmod(partial, mode)


def _prefix(target: Path) -> str:
    return f".{target.name[:48]}.partial-"


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A folder beside it, for as long as the block runs; what killed ones left goes first."""
    _sweep(target)
    folder, lock = _workplace(target)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _workplace(target: Path) -> tuple[Path, int | None]:
    """A folder beside the file that belongs to this process as long as the lock is open."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        try:
            lock = _lock(folder)
        except BlockingIOError:  # somebody takes it for a leftover
            continue
        except OSError:
            if folder.exists():  # the file system has no locks
                return folder, None
            continue
        if lock is None or folder.exists():
            return folder, lock
        os.close(lock)


def _lock(folder: Path) -> int | None:
    """The folder opened and locked; None where there are no locks.

    Raises:
        OSError: it is gone, the file system has no locks, or (`BlockingIOError`) somebody has it.
    """
    if fcntl is None:
        return None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


def _sweep(target: Path) -> None:
    """Remove what killed writers of this file left behind."""
    for folder in target.parent.glob(f"{glob.escape(_prefix(target))}*"):
        with suppress(OSError):
            lock = _lock(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)
