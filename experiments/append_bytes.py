"""Bytes that one new token moves: kvtrim's store beside transformers' DynamicCache.

Every operation on tensors is watched; what it writes counts as moved. A store has slack behind
each head's run, so most appends write the new entries alone; when the slack of a head is used up
the layer is copied once, and the average over many tokens says how often that happens.

    python experiments/append_bytes.py [--out experiments/append_bytes]

One layer, 8 KV heads of 128, fp32; ragged heads hold 0.5 to 1.5 times the length named.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicLayer

from kvtrim.bench.provenance import provenance
from kvtrim.cache.store import LayerStore

HEADS, WIDTH, TOKENS = 8, 128, 512
HELD = (256, 1024, 4096, 16384)


class Written(TorchDispatchMode):
    """Adds up the bytes of what operations write: results that are no views."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operation and count."""
        out = func(*args, **(kwargs or {}))
        name = func.name()
        if name.startswith(("aten::copy_", "aten::fill_")):
            self.bytes += args[0].nbytes
        elif name.startswith("aten::index_copy_"):
            self.bytes += args[3].nbytes
        elif isinstance(out, torch.Tensor) and not name.endswith("_") and not out._is_view():
            self.bytes += 0 if name.startswith("aten::empty") else out.nbytes
        return out


def moved(append: Any) -> list[int]:
    """Bytes of each of many appends."""
    found = []
    for _ in range(TOKENS):
        new = torch.ones(1, HEADS, 1, WIDTH)
        with Written() as written:
            append(new)
        found.append(written.bytes)
    return found


def subjects(held: int) -> dict[str, Any]:
    """What appends one token to so many."""
    start = torch.randn(1, HEADS, held, WIDTH)
    layer = DynamicLayer()
    layer.update(start, start)
    counts = torch.linspace(0.5 * held, 1.5 * held, HEADS).long()[None]
    return {
        "DynamicCache": lambda new: layer.update(new, new),
        "kvtrim, equal heads": appending(torch.full_like(counts, held)),
        "kvtrim, ragged heads": appending(counts),
    }


def appending(counts: torch.Tensor) -> Any:
    """A store of so many entries per head."""
    total = int(counts.sum())
    buffers = {
        "keys": torch.randn(total, WIDTH),
        "values": torch.randn(total, WIDTH),
        "positions": torch.zeros(total, dtype=torch.int32),
    }
    store = LayerStore.pack(buffers, counts)
    place = torch.zeros(1, 1, 1, dtype=torch.int32)
    return lambda new: store.append({"keys": new, "values": new, "positions": place})


def main() -> None:
    """Measure and write append_bytes.json and append_bytes.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("experiments/append_bytes"))
    out = parser.parse_args().out
    rows = []
    for held in HELD:
        for name, append in subjects(held).items():
            each = moved(append)
            rows.append({"held": held, "cache": name, "median": median(each), "mean": mean(each)})
    record = {"machine": provenance(torch.device("cpu")), "tokens": TOKENS, "rows": rows}
    out.mkdir(parents=True, exist_ok=True)
    (out / "append_bytes.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "append_bytes.md").write_text(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    entry = 2 * WIDTH * 4 * HEADS / 1024
    lines = [
        f"Bytes written per appended token, one layer ({HEADS} KV heads of {WIDTH}, fp32; the new "
        f"entries themselves are {entry:.0f} KiB), {TOKENS} tokens.\n",
        "| entries held | cache | median | mean |",
        "|---:|---|---:|---:|",
    ]
    for row in rows:
        figures = (f"{row[name] / 1024:,.1f} KiB" for name in ("median", "mean"))
        lines.append(f"| {row['held']:,} | {row['cache']} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
