"""Whether the header of a GGUF file describes that file: asked before a reader trusts it.

Readers take counts, lengths and places as they stand there, so that a damaged file costs them any
amount of memory, or gives weights of somewhere else. llama.cpp's reader refuses what is refused
here; the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import mmap
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvtrim.errors import ModelError
from kvtrim.files import file_errors

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_PLAIN = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "B",
    10: "Q",
    11: "q",
    12: "d",
}
_BOOL, _STRING, _ARRAY, _FLOATS = 7, 8, 9, (6, 12)
_LEAST_PAIR, _LEAST_TENSOR = 13, 25  # bytes of the shortest entry
_LAYER = re.compile(r"blk\.(\d+)\.")


class _Wrong(Exception):
    """What is wrong with the header."""


class _Reader:
    """Numbers and texts of a file, one after the other, never beyond its end."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, count: int, what: str) -> bytes:
        if count > self.left:
            raise _Wrong(f"{what} is longer than the file")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, kind: str, what: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}"), what))[0]

    def text(self, what: str) -> bytes:
        return self.take(self.number("Q", what), what)

    def name(self, what: str) -> str:
        try:
            return self.text(what).decode()
        except UnicodeDecodeError:
            raise _Wrong(f"{what} is no text") from None

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        """A value; of an array its length is enough."""
        if kind == _STRING:
            return self.text(what)
        if kind == _ARRAY:
            return self._array(what, depth)
        if kind not in _PLAIN:
            raise _Wrong(f"{what} is of type {kind}, which there is not")
        found = self.number(_PLAIN[kind], what)
        if (kind == _BOOL and found > 1) or (kind in _FLOATS and not math.isfinite(found)):
            raise _Wrong(f"{what} is {found}")
        return found

    def _array(self, what: str, depth: int) -> "_Array":
        kind, count = self.number("I", what), self.number("Q", what)
        if depth > 2:
            raise _Wrong(f"{what} is nested too deep")
        if kind in _PLAIN:
            self.take(count * struct.calcsize(f"<{_PLAIN[kind]}"), what)
        else:
            if count * 8 > self.left:
                raise _Wrong(f"{what} is longer than the file")
            for _ in range(count):
                self.value(kind, what, depth + 1)
        return _Array(count)


class _Array(int):
    """How many elements an array has."""


def require_sound(path: Path) -> None:
    """Refuse a GGUF file whose header does not describe it.

    Raises:
        ModelError: saying what is wrong.
        FileError: it cannot be read.
    """
    try:
        with file_errors("read", path), path.open("rb") as file:
            if not path.stat().st_size:
                raise _Wrong("it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _check(_Reader(data))
    except _Wrong as error:
        raise ModelError(
            f"cannot load {path}: this is no GGUF file, or it is damaged: {error}; get it again"
        ) from None


def _check(file: _Reader) -> None:
    if file.take(4, "its mark") != _MAGIC:
        raise _Wrong("it does not begin with GGUF")
    version = file.number("I", "its version")
    if version not in _VERSIONS:
        raise _Wrong(f"its version is {version}, known are 2 and 3")
    tensors, pairs = file.number("Q", "its head"), file.number("Q", "its head")
    if tensors * _LEAST_TENSOR + pairs * _LEAST_PAIR > file.left:
        raise _Wrong("it names more tensors and values than fit into it")
    values: dict[str, Any] = {}
    for _ in range(pairs):
        name = file.name("the name of a value")
        if name in values:
            raise _Wrong(f"{name} is there twice")
        values[name] = file.value(file.number("I", name), name)
    _check_values(values)
    _check_tensors(list(_tensors(file, tensors)), values, file)


def _check_values(values: dict[str, Any]) -> None:
    """The architecture is named, and lists about tokens are of one length."""
    kind = values.get("general.architecture")
    if not isinstance(kind, bytes) or not kind.isascii():
        raise _Wrong("it does not say its architecture")
    for name in ("block_count", "embedding_length", "attention.head_count"):
        value = values.get(f"{kind.decode()}.{name}")
        if not isinstance(value, int) or value < 1:
            raise _Wrong(f"{kind.decode()}.{name} is {value!r}")
    tokens = values.get("tokenizer.ggml.tokens")
    for name, value in values.items():
        beside = name in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type")
        if beside and value != tokens:
            raise _Wrong(f"{name} is not as long as the list of tokens")
        if name.startswith("tokenizer.ggml.") and name.endswith("_token_id"):
            if not isinstance(value, int) or not isinstance(tokens, int) or value >= tokens:
                raise _Wrong(f"{name} is {value!r}, which is no token")


def _tensors(file: _Reader, count: int) -> Iterator[tuple[str, list[int], int, int]]:
    for _ in range(count):
        name = file.name("the name of a tensor")
        dimensions = file.number("I", name)
        if not 1 <= dimensions <= 4:
            raise _Wrong(f"{name} has {dimensions} dimensions")
        shape = [file.number("Q", name) for _ in range(dimensions)]
        yield name, shape, file.number("I", name), file.number("Q", name)


def _check_tensors(
    tensors: list[tuple[str, list[int], int, int]], values: dict[str, Any], file: _Reader
) -> None:
    """Tensors follow each other without gaps, to the end of the file, in every layer."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # an extra, see `gguf`

    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _Wrong(f"general.alignment is {alignment!r}")
    begin = -(-file.at // alignment) * alignment
    known = {int(kind): GGML_QUANT_SIZES[kind] for kind in GGMLQuantizationType}
    expected, names = 0, set[str]()
    for name, shape, kind, offset in tensors:
        if name in names or kind not in known:
            raise _Wrong(f"{name} is there twice, or of type {kind}")
        block, size = known[kind]
        if not all(shape) or shape[0] % block:
            raise _Wrong(f"{name} has shape {shape}")
        if offset != expected:
            raise _Wrong(f"{name} begins at {offset}, not {expected}")
        stop = offset + math.prod(shape) // block * size
        if begin + stop > len(file.data):
            raise _Wrong(f"{name} reaches beyond the file, which is cut short or not loaded whole")
        expected = -(-stop // alignment) * alignment
        names.add(name)
    layers = {int(found[1]) for name in names if (found := _LAYER.match(name))}
    count = values[f"{values['general.architecture'].decode()}.block_count"]
    if layers != set(range(len(layers))) or len(layers) != count:
        raise _Wrong(f"it has {len(layers)} layers and says {count}")
