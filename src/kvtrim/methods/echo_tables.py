"""Tables of echo: per layer and KV head a linear map of hidden states, fitted once per model.

A table is a safetensors file with `weight` [L, K, M], fp16, and `bias` [L, K], fp32, over the
layers that kvtrim manages: the first map. It may have, in fp32, what the first map makes of the
lengths of keys and values, `lengths` [L, K, 4 K], and two second maps, with and without queries
that were asked: `asked.weight` [L, K, 3 K + 4] and `end.weight` [L, K, K + 4], each with its bias
[L, K] (`policies/echo.py` says what they read). The record beside it (NAME.record.json) says what
it was fitted on and how well it foretells held-out texts.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from kvtrim import files
from kvtrim.errors import UsageError
from kvtrim.types import Float, Target, Tensor

SHIPPED = Path(__file__).parent / "tables" / "echo"
SUFFIX, RECORD = ".safetensors", ".record.json"
_WIDTHS: Mapping[str, Callable[[int, int], list[int]]] = {
    "weight": lambda heads, width: [width],
    "bias": lambda heads, width: [],
    "lengths": lambda heads, width: [4 * heads],
    "end.weight": lambda heads, width: [heads + 4],
    "end.bias": lambda heads, width: [],
    "asked.weight": lambda heads, width: [3 * heads + 4],
    "asked.bias": lambda heads, width: [],
}  # how many numbers a head has in each tensor of a table
_PAIRS = (("weight", "bias"), ("end.weight", "end.bias"), ("asked.weight", "asked.bias"))
HOW_TO = "kvtrim calibrate echo --model MODEL --out FILE"
HOW_LONG = "about four prefills of 20,000 tokens: minutes on a GPU, a quarter of an hour on CPUs"


@dataclass(frozen=True)
class Linear:
    """A linear map of every layer to its KV heads, or of one layer."""

    weight: Float[Tensor, "*L K F"]
    bias: Float[Tensor, "*L K"]
    lengths: Float[Tensor, "*L K G"] | None = None  # of keys and values, where they count

    def of(self, layer: int, device: torch.device) -> "Linear":
        """One layer's, in fp32."""
        weight, bias = self.weight[layer], self.bias[layer]
        lengths = None if self.lengths is None else self.lengths[layer].to(device, torch.float32)
        return Linear(weight.to(device, torch.float32), bias.to(device, torch.float32), lengths)


@dataclass(frozen=True)
class EchoTable:
    """What echo knows of a model."""

    weight: Float[Tensor, "L K M"]
    bias: Float[Tensor, "L K"]
    lengths: Float[Tensor, "L K G"] | None = None
    end: Linear | None = None
    asked: Linear | None = None
    _placed: dict[tuple[str, int, torch.device], Linear] = field(default_factory=dict)

    def first(self, layer: int, device: torch.device) -> Linear:
        """A layer's first map, where it is needed."""
        return self._place("first", Linear(self.weight, self.bias, self.lengths), layer, device)

    def second(self, layer: int, asked: bool, device: torch.device) -> Linear | None:
        """A layer's second map, if there is one; the one with queries that were asked, or not."""
        name, whole = ("asked", self.asked) if asked else ("end", self.end)
        return None if whole is None else self._place(name, whole, layer, device)

    def _place(self, name: str, whole: Linear, layer: int, device: torch.device) -> Linear:
        key = name, layer, device
        if key not in self._placed:
            self._placed[key] = whole.of(layer, device)
        return self._placed[key]

    def tensors(self) -> dict[str, Tensor]:
        """As they stand in a file."""
        found = {"weight": self.weight.half(), "bias": self.bias.float()}
        if self.lengths is not None:
            found["lengths"] = self.lengths.float()
        for name, second in (("end", self.end), ("asked", self.asked)):
            if second is not None:
                found[f"{name}.weight"] = second.weight.float()
                found[f"{name}.bias"] = second.bias.float()
        return {name: tensor.contiguous() for name, tensor in found.items()}


def shipped_tables() -> dict[str, Path]:
    """The tables that come with kvtrim, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob(f"*{SUFFIX}"))}


def measured_on(identity: str | None) -> str | None:
    """The name of the first shipped table that was fitted on exactly these weights."""
    for name, path in shipped_tables().items():
        if identity is not None and record_of(path).get("identity") == identity:
            return name
    return None


def record_path(path: Path) -> Path:
    """Where the record of a table is: table.safetensors has table.record.json."""
    return path.with_name(path.name.removesuffix(SUFFIX) + RECORD)


def record_of(path: Path) -> dict[str, Any]:
    """What was written beside a table when it was fitted; empty where nothing was."""
    beside = record_path(path)
    return json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}


def read(table: str) -> EchoTable:
    """A shipped table by its name, or a file.

    Raises:
        UsageError: no such table, or a file that is none.
    """
    names = shipped_tables()
    path = names.get(table) or Path(table).expanduser()
    if not path.is_file():
        raise UsageError(
            f"no echo table {table!r}: neither a file nor one that comes with kvtrim "
            f"({', '.join(names)}). Fit one: {HOW_TO}"
        )
    found = path.stat()
    return _read(path, found.st_mtime_ns, found.st_size)


def require_shape(table: str, target: Target) -> None:
    """Refuse a table of other layers, heads or widths than the model has.

    Raises:
        UsageError: saying both.
    """
    layers, kv_heads, width = read(table).weight.shape
    wanted = [target.layers, target.kv_heads or kv_heads, target.width or width]
    if [layers, kv_heads, width] != wanted:
        raise UsageError(
            f"the echo table {table} is of {layers} layers, {kv_heads} KV heads and hidden states "
            f"of {width}; {target.name} has {wanted[0]}, {wanted[1]} and {wanted[2]}. Use a table "
            f"of this model. Fit one: {HOW_TO}"
        )


def write(path: Path, table: EchoTable, record: dict[str, Any]) -> None:
    """Write a table and its record; older files are replaced only once both are complete.

    Raises:
        FileError: the folder cannot be written to, or the disk is full.
    """
    files.replace_with_record(path, save(table.tensors()), record_path(path), record)


@lru_cache(maxsize=16)
def _read(path: Path, *stamp: int) -> EchoTable:
    """As `read`; the stamp is what a changed file differs in."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} is no echo table: {error}") from error
    names = tensors.keys()
    paired = all(set(pair) <= names or not set(pair) & names for pair in _PAIRS)
    if not (paired and "weight" in names and all(_fits(tensors, name) for name in names)):
        raise UsageError(
            f"{path} is no echo table: expected weight [L, K, M] and bias [L, K], and beside them "
            "only what belongs to a table"
        )
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise UsageError(f"{path} is no echo table: its numbers are not all finite")
    end, asked = (
        Linear(tensors[f"{name}.weight"], tensors[f"{name}.bias"])
        if f"{name}.weight" in names
        else None
        for name in ("end", "asked")
    )
    first = tensors["weight"], tensors["bias"].float(), tensors.get("lengths")
    return EchoTable(*first, end, asked)


def _fits(tensors: Mapping[str, Tensor], name: str) -> bool:
    """A tensor belongs to a table, and has the shape that it has there."""
    shape = list(tensors["weight"].shape)
    if name not in _WIDTHS or len(shape) != 3:
        return False
    return list(tensors[name].shape) == [*shape[:2], *_WIDTHS[name](*shape[1:])]
