"""What scoring and selecting cost in the prefill: seconds, share of the prefill, largest tensor.

A prompt is read once; then every method goes through the recorded pass: score, select, cut, and
for methods that probe, the probe. A share is of plain transformers' prefills in the same run. The
largest tensor that this makes is counted in numbers, beside those of the prompt's keys and of an
n x n matrix; what the model and the recording hold already does not count. Methods that change the
prefill itself have no such share: experiments/fast_prefill has their times.

    python experiments/overhead.py [--length 4000] [--repeats 3] [--method NAME ...]
        [--out experiments/overhead]

Writes overhead.json (figures and each run's record) and overhead.md (the table). With --method
the rows of other methods stay as they are.
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kvtrim
from kvtrim.bench.provenance import provenance
from kvtrim.hf.generate import plain_cache
from kvtrim.hf.replay import Recording, record
from kvtrim.methods.settings import find


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor made holds."""

    def __init__(self, known: Iterable[torch.Tensor]):
        super().__init__()
        self.numel = 0
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else [out]:
            if isinstance(made, torch.Tensor):
                # a view that repeats memory is no allocation
                storage = made.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.numel = max(self.numel, storage.nbytes() // 4)
        return out


def prefill_s(model, ids) -> float:
    """Seconds of plain transformers' prefill."""
    start = perf_counter()
    with torch.no_grad():
        model(ids, past_key_values=plain_cache(model), logits_to_keep=1)
    return perf_counter() - start


def cut_s(recording: Recording, method: str, tokenizer: Any) -> float:
    """Seconds of going through the recorded pass under a method, nothing remembered."""
    fresh = replace(recording, _known={})
    start = perf_counter()
    fresh.cache(method, 512, tokenizer=tokenizer)
    return perf_counter() - start


def main() -> None:
    """Run and write the two files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--method", nargs="+", help="all that leave the prefill alone by default")
    parser.add_argument("--out", type=Path, default=Path("experiments/overhead"))
    given = parser.parse_args()
    model, tokenizer = kvtrim.load()
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40000, (1, given.length), generator=draw)
    recording, rows, base = record(model, ids), [], []
    calls = [x for c in recording.calls for x in (c.queries, c.keys, c.values)]
    known = [*model.parameters(), *model.buffers(), *calls]
    methods = [name for name in kvtrim.METHODS if not find(name).propagation.narrows]
    for method in given.method or methods:
        cut_s(recording, method, tokenizer)
        own = [cut_s(recording, method, tokenizer) for _ in range(given.repeats)]
        base.append(prefill_s(model, ids))
        with Largest(known) as largest:
            cut_s(recording, method, tokenizer)
        rows.append({"method": method, "seconds": median(own), "largest": largest.numel})
        print(rows[-1], flush=True)
    run = {"machine": provenance(model.device), "model": "smollm2", "keep": 512}
    run |= {"length": given.length, "repeats": given.repeats, "prefill_s": median(base)}
    rows = [{**row, "share": row["seconds"] / median(base), "run": run} for row in rows]
    path = given.out / "overhead.json"
    before = json.loads(path.read_text()) if given.method and path.exists() else []
    own = {row["method"]: row for row in [*before, *rows]}
    rows = [own[name] for name in methods if name in own]
    keys = recording.calls[0].keys.numel()
    given.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")
    lines = [
        f"Scoring, selecting and cutting {given.length:,} tokens to keep 512; share of a plain "
        "prefill in the same run;",
        f"largest tensor made, in numbers: one layer's keys hold {keys:,}, an n x n matrix "
        f"{given.length**2:,}.\n",
        "| method | seconds | of prefill | largest tensor |",
        "|---|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['method']} | {row['seconds']:.2f} | {100 * row['share']:.1f}% | "
            f"{row['largest']:,} |"
        )
    (given.out / "overhead.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
