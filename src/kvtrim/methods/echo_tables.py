"""Tables of echo: per layer and KV head a linear map of hidden states, fitted once per model.

A table is a safetensors file with `weight` [L, K, M], fp16, and `bias` [L, K], fp32, over the
layers that kvtrim manages; the record beside it (NAME.record.json) says what it was fitted on and
how well it foretells held-out texts.
"""

import hashlib
import json
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
HOW_TO = "kvtrim calibrate echo --model MODEL --out FILE"
HOW_LONG = "about four prefills of 20,000 tokens: minutes on a GPU, a quarter of an hour on CPUs"


@dataclass(frozen=True)
class EchoTable:
    """One linear map per layer and KV head."""

    weight: Float[Tensor, "L K M"]
    bias: Float[Tensor, "L K"]
    _placed: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def of(
        self, layer: int, device: torch.device
    ) -> tuple[Float[Tensor, "K M"], Float[Tensor, " K"]]:
        """A layer's weight and bias in fp32, where they are needed."""
        key = layer, device
        if key not in self._placed:
            self._placed[key] = (
                self.weight[layer].to(device, torch.float32),
                self.bias[layer].to(device),
            )
        return self._placed[key]


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
    """Write a table and its record; older files are replaced only by complete ones.

    Raises:
        UsageError: the folder cannot be written to.
    """
    tensors = {"weight": table.weight.half().contiguous(), "bias": table.bias.float().contiguous()}
    content = save(tensors)
    digest = hashlib.sha256(content).hexdigest()
    try:
        beside = json.dumps(record | {"sha256": digest}, indent=1) + "\n"
        files.replace(record_path(path), beside.encode())
        files.replace(path, content)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error


@lru_cache(maxsize=16)
def _read(path: Path, *stamp: int) -> EchoTable:
    """As `read`; the stamp is what a changed file differs in."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} is no echo table: {error}") from error
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None or bias is None or weight.ndim != 3 or bias.shape != weight.shape[:2]:
        raise UsageError(f"{path} is no echo table: expected weight [L, K, M] and bias [L, K]")
    if not (bool(weight.isfinite().all()) and bool(bias.isfinite().all())):
        raise UsageError(f"{path} is no echo table: its numbers are not all finite")
    return EchoTable(weight, bias.float())
