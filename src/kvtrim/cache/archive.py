"""The file of a saved cache: safetensors plus one JSON record, written whole or not at all.

The record lists every tensor's type and shape, so that a file is known to be what it claims before
any of it is read, and stands in the file's metadata with a SHA-256 of its own and another over
itself and every tensor: a truncated or altered file is noticed before any of it is used.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kvtrim.errors import CacheFileError, FileError
from kvtrim.files import parse, replacement
from kvtrim.types import Tensor

FORMAT = 2
_RECORD, _RECORD_DIGEST, _DIGEST = "kvtrim", "record_sha256", "sha256"
_LONGEST = 50_000_000  # bytes of a header; ours have a few thousand for each layer
_AGAIN = "compress the document again"


def write(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], record: dict[str, Any]
) -> None:
    """Write a cache file; an older one of that name is replaced once the new one is complete.

    Raises:
        CacheFileError: the folder cannot be written to, the disk is full, or something lies there
            that is not a file.
    """
    target = Path(path)
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    table = {name: [str(t.dtype), list(t.shape)] for name, t in on_cpu.items()}
    text = json.dumps({"format": FORMAT, **record, "tensors": table}, sort_keys=True)
    metadata = {
        _RECORD: text,
        _RECORD_DIGEST: hashlib.sha256(text.encode()).hexdigest(),
        _DIGEST: _digest(text, on_cpu),
    }
    try:
        with replacement(target) as partial:
            save_file(on_cpu, partial, metadata)
    except FileError as error:
        raise CacheFileError(str(error)) from error
    except SafetensorError as error:
        raise CacheFileError(f"cannot write {target}: {error}") from error


@dataclass(frozen=True)
class Archive:
    """A cache file of which only the header was read."""

    path: Path
    record: dict[str, Any]
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    metadata: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(_size(*each) for each in self.shapes.values())

    def read_some(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Some tensors, to look at: what they hold is not checked, which takes all of them.

        Raises:
            CacheFileError: they are not there, or not what the record says.
        """
        if not {*names} <= {*self.shapes}:
            raise CacheFileError(f"{self.path} does not hold all that it should; {_AGAIN}")
        with _open(self.path) as file:
            tensors = {name: file.get_tensor(name) for name in names}
        if any((t.dtype, tuple(t.shape)) != self.shapes[name] for name, t in tensors.items()):
            raise CacheFileError(f"{self.path} was altered after it was written; {_AGAIN}")
        return tensors

    def read(self) -> dict[str, Tensor]:
        """The tensors, on the CPU.

        Raises:
            CacheFileError: it was truncated or altered, or is larger than this machine's memory.
        """
        memory = _memory()
        if memory is not None and self.nbytes > memory:
            raise CacheFileError(
                f"{self.path} holds {self.nbytes / 2**30:.1f} GiB, and this machine has "
                f"{memory / 2**30:.1f} GiB of memory"
            )
        with _open(self.path) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        there = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
        if there != self.shapes or self.metadata.get(_DIGEST) != _digest(
            self.metadata[_RECORD], tensors
        ):
            raise CacheFileError(f"{self.path} was altered after it was written; {_AGAIN}")
        return tensors


def open_archive(path: str | os.PathLike[str]) -> Archive:
    """A cache file, its header read and checked.

    Raises:
        CacheFileError: no such file, no cache file, of another format, truncated, or altered.
    """
    source = Path(path)
    if not source.is_file():
        what = "not a regular file" if source.exists() else "no such cache file"
        raise CacheFileError(f"{what}: {source}")
    with _open(source) as file:
        metadata = file.metadata() or {}
        there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    if _RECORD not in metadata:
        raise CacheFileError(f"{source} is a safetensors file, but kvtrim did not write it")
    record = _record(source, metadata)
    try:
        table = {name: _entry(*each) for name, each in record["tensors"].items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CacheFileError(f"{source} does not say what it holds; {_AGAIN}") from None
    if there != {name: shape for name, (_, shape) in table.items()}:
        raise CacheFileError(f"{source} holds other tensors than it says; {_AGAIN}")
    return Archive(source, record, table, metadata)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the record of a cache file.

    Raises:
        CacheFileError: as `open_archive` and `Archive.read`.
    """
    archive = open_archive(path)
    return archive.read(), archive.record


def _record(source: Path, metadata: dict[str, str]) -> dict[str, Any]:
    text = metadata[_RECORD]
    try:
        record = parse(text)
    except ValueError as error:
        raise CacheFileError(f"{source} has a damaged record ({error}); {_AGAIN}") from None
    if not isinstance(record, dict):
        raise CacheFileError(f"{source} has a damaged record; {_AGAIN}")
    if record.get("format") != FORMAT:
        versions = record.get("versions")
        version = versions.get("kvtrim") if isinstance(versions, dict) else "?"
        raise CacheFileError(
            f"{source} was written by kvtrim {version} in format {record.get('format')}, this one "
            f"reads {FORMAT}: use the version that wrote it, or {_AGAIN}"
        )
    if metadata.get(_RECORD_DIGEST) != hashlib.sha256(text.encode()).hexdigest():
        raise CacheFileError(f"{source} was altered after it was written; {_AGAIN}")
    return record


def _entry(dtype: str, shape: list[int]) -> tuple[torch.dtype, tuple[int, ...]]:
    kind = getattr(torch, dtype.removeprefix("torch."))
    if not isinstance(kind, torch.dtype) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(dtype, shape)
    return kind, tuple(shape)


@contextmanager
def _open(source: Path) -> Iterator[Any]:
    """The file in safetensors' hands; whatever they say of it as a `CacheFileError`."""
    try:
        with source.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
        if length > _LONGEST:
            raise ValueError("its header is too long")
        with safe_open(source, "pt") as file:
            yield file
    except CacheFileError:
        raise
    except MemoryError as error:
        raise CacheFileError(f"{source} does not fit into memory") from error
    except Exception as error:  # a library in another language, given what anybody may have made
        raise CacheFileError(f"{source} is no cache file, or it was cut short: {error}") from error


def _size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    size = dtype.itemsize
    for count in shape:
        size *= count
    return size


def _memory() -> int | None:
    """Bytes of memory of this machine, where the system says."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _digest(record: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the record and of every tensor's name, type, shape and bytes."""
    total = hashlib.sha256(record.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()
