"""Named documents on disk: each one's cache, its text, and what both belong to.

A document's files are named by what they were made from (text, model, tokenizer, method, budget),
so the same is never read twice; a name is a small record that points to them and is written last.
So whoever kills a writer leaves files that nobody points to, which the next writer removes, and
never a name without its document.

    names/manual.json    the record; its time of change is when the document was last used
    caches/KEY.kv        the cache, as `kvtrim.load_cache` reads it
    texts/KEY.txt        the text
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from kvtrim import files
from kvtrim.errors import FileError, UnknownNameError, UsageError

try:
    import fcntl
except ImportError:  # not a Unix: writers of one library are not kept apart
    fcntl = None

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FORMAT = 1
_KEY = re.compile(r"[0-9a-f]{64}")
FOLDER = "KVTRIM_LIBRARY"
"""The environment variable that says where the library is, if no option does."""


def data_folder() -> Path:
    """Where kvtrim keeps what is a user's."""
    import platformdirs

    return Path(platformdirs.user_data_dir("kvtrim"))


def default_folder() -> Path:
    """Where a user's documents are kept, unless told otherwise."""
    told = os.environ.get(FOLDER)
    return Path(told) if told else data_folder() / "library"


@dataclass(frozen=True)
class Entry:
    """One named document: what it is, how it was read, what it takes."""

    name: str
    key: str  # hash of everything that decides what the cache holds
    model: str  # as the user named it
    model_print: str  # hash of its shape and weights
    tokenizer_print: str
    method: str
    keep: str
    tokens: int  # of the document, template included
    characters: int
    text_sha256: str
    held_bytes: int
    full_bytes: int
    made: float  # seconds since 1970
    settings: dict[str, Any] = field(default_factory=dict)
    chat: bool | None = None
    system: str | None = None
    remark: str | None = None
    used: float = 0.0  # likewise; not in the record
    file_bytes: int = 0  # cache and text on the disk; likewise


_STORED = [each.name for each in fields(Entry) if each.name not in ("name", "used", "file_bytes")]
_KINDS: dict[str, Any] = {
    each.name: {str: str, int: int, float: (int, float), dict[str, Any]: dict}[each.type]
    for each in fields(Entry)
    if each.name in _STORED and each.type in (str, int, float, dict[str, Any])
}


def key_of(*parts: Any) -> str:
    """A hash of what a cache is made from; parts are what JSON can say."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def check_name(name: str) -> str:
    """A document's name, which is never a path.

    Raises:
        UsageError: it is none.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name[:80]!r} is no name for a document: use up to 64 letters, digits, dots, dashes "
            "and underscores, a letter or digit first"
        )
    return name


class Library:
    """The documents in one folder, which several processes may use at once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._names, self._caches, self._texts = (folder / x for x in ("names", "caches", "texts"))

    # Looking

    def entries(self) -> tuple[list[Entry], list[str]]:
        """All documents, the last used first, and what is wrong with records that are damaged."""
        found, damaged = [], []
        for path in sorted(self._names.glob("*.json")) if self._names.is_dir() else []:
            try:
                entry = self._entry(path)
            except FileError as error:
                damaged.append(str(error))
            else:
                found += [] if entry is None else [entry]
        return sorted(found, key=lambda each: -each.used), damaged

    def get(self, name: str) -> Entry:
        """One document.

        Raises:
            UsageError: that is no name; UnknownNameError: nothing has it.
            FileError: its record is damaged.
        """
        path = self._names / f"{check_name(name)}.json"
        there = path.is_file() and path.name in os.listdir(self._names)
        entry = self._entry(path) if there else None
        if entry is not None:
            return entry
        known = [each.name for each in self.entries()[0]]
        if not known:
            raise UsageError(
                f"there is no document {name!r}: the library {self.folder} is empty; "
                f"kvtrim compress FILE --name {name} adds it"
            )
        raise UnknownNameError("document", name, known)

    def find(self, key: str) -> Entry | None:
        """A document whose cache was made from exactly this, if its files are still there."""
        found = (each for each in self.entries()[0] if each.key == key)
        return next((each for each in found if self.cache_path(each).is_file()), None)

    def cache_path(self, entry: Entry) -> Path:
        """The file of its cache."""
        return self._caches / f"{entry.key}.kv"

    def text(self, entry: Entry) -> str:
        """The text as it was given.

        Raises:
            FileError: it is gone, or was altered.
        """
        path = self._texts / f"{entry.key}.txt"
        text = files.text_of(path)
        if hashlib.sha256(text.encode()).hexdigest() != entry.text_sha256:
            raise FileError("read", path, "it was altered after it was written")
        return text

    # Changing

    def add(self, entry: Entry, text: str, write: Callable[[Path], None]) -> Entry:
        """Keep a document under its name; one of that name is replaced once this one is whole.

        Args:
            write: writes the cache to a path, whole or not at all.

        Raises:
            UsageError: no name, or one that differs from another in upper and lower case alone.
            FileError: the folder cannot be written to, or the disk is full.
        """
        self._require_apart(entry.name)  # before anything is written
        for folder in (self._names, self._caches, self._texts):
            files.make_folder(folder, parents=True)
        with self._write_lock():
            self._require_apart(entry.name)  # of what others wrote meanwhile
            write(self.cache_path(entry))
            files.replace(self._texts / f"{entry.key}.txt", text.encode())
            self._write(entry)
            self._sweep()
            return self.get(entry.name)

    def name_again(self, entry: Entry, name: str) -> Entry | None:
        """Give a document that is there one more name; None if its files went meanwhile."""
        with self._write_lock():
            self._require_apart(name)
            if not self.cache_path(entry).is_file():
                return None  # another process removed it since it was found
            self._write(replace(entry, name=name))
            self._sweep()
            return self.get(name)

    def use(self, entry: Entry) -> None:
        """Note that a document was used now."""
        try:
            os.utime(self._names / f"{entry.name}.json")
        except OSError:
            return  # removed meanwhile, or a library that may only be read

    def rename(self, old: str, new: str) -> Entry:
        """Another name for a document.

        Raises:
            UsageError: the new name is none, or taken.
        """
        entry = self.get(old)
        if old != new:
            self._require_apart(new)
            with self._write_lock(), files.file_errors("write", self._names / f"{new}.json"):
                if (self._names / f"{new}.json").exists():
                    raise UsageError(f"there is a document {new!r} already; remove it first")
                os.rename(self._names / f"{entry.name}.json", self._names / f"{new}.json")
        return self.get(new)

    def remove(self, name: str) -> Entry:
        """Remove a document; its files go with their last name."""
        self.get(name)  # before the lock, which only a library has
        with self._write_lock():
            entry = self.get(name)  # which another process may have removed, or replaced
            self._remove(entry)
            self._sweep()
        return entry

    def prune(self, size: int) -> list[Entry]:
        """Remove documents, the one not used for longest first, until all take `size` bytes."""
        removed: list[Entry] = []
        if not self._names.is_dir():
            return removed
        with self._write_lock():
            left, _ = self.entries()
            while sum({each.key: each.file_bytes for each in left}.values()) > size:
                removed.append(left.pop())
                self._remove(removed[-1])
            self._sweep()
        return removed

    # Records

    def _entry(self, path: Path) -> Entry | None:
        """What a record says; None if it was removed meanwhile."""
        try:
            record, used = files.record_of(path), path.stat().st_mtime
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        try:
            wrong = [name for name, kind in _KINDS.items() if not isinstance(record[name], kind)]
            if wrong or record["format"] != _FORMAT or not _KEY.fullmatch(record["key"]):
                raise ValueError(", ".join(wrong) or "key, or format")
            own: dict[str, Any] = {"name": path.stem, "used": used}
            entry = Entry(**own, **{name: record[name] for name in _STORED})
        except (KeyError, TypeError, ValueError) as error:
            raise FileError("read", path, f"it is no record of a document ({error})") from None
        return replace(entry, file_bytes=self._file_bytes(entry))

    def _file_bytes(self, entry: Entry) -> int:
        total = 0
        for path in (self.cache_path(entry), self._texts / f"{entry.key}.txt"):
            with suppress(FileNotFoundError):
                total += path.stat().st_size
        return total

    def _remove(self, entry: Entry) -> None:
        """Remove a name. The caller holds the lock, and sweeps."""
        path = self._names / f"{entry.name}.json"
        with files.file_errors("write", path):
            path.unlink(missing_ok=True)

    def _write(self, entry: Entry) -> None:
        record = {"format": _FORMAT, **{name: getattr(entry, name) for name in _STORED}}
        text = json.dumps(record, ensure_ascii=False, indent=1) + "\n"
        files.replace(self._names / f"{entry.name}.json", text.encode())

    def _require_apart(self, name: str) -> None:
        check_name(name)
        for path in self._names.glob("*.json") if self._names.is_dir() else []:
            if path.stem != name and path.stem.lower() == name.lower():
                raise UsageError(
                    f"{name!r} differs from the document {path.stem!r} in upper and lower case "
                    "alone, which some file systems do not tell apart; choose another name"
                )

    def _sweep(self) -> None:
        """Remove files that no name points to. The caller holds the lock."""
        pointed = set()
        for path in self._names.glob("*.json"):
            try:
                pointed.add(files.record_of(path).get("key"))
            except FileError:
                return  # a damaged record may point to any of them
        for path in (*self._caches.glob("*.kv"), *self._texts.glob("*.txt")):
            if path.stem not in pointed:
                path.unlink(missing_ok=True)

    @contextmanager
    def _write_lock(self) -> Iterator[None]:
        """One writer at a time."""
        lock = self.folder / ".lock"
        with files.file_errors("write", lock):
            file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)
