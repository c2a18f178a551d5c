"""Prefill of plain transformers and of kvtrim in turn, so that a drifting machine disturbs least.

    python experiments/prefill_pairs.py [--length 4000] [--rounds 5] [--out experiments/core_speed]

Every round runs plain transformers, the full cache through kvtrim and snapkv at 512, forwards and
backwards in turn. Writes prefill_pairs.json: wall and processor seconds, ratios, the run's record.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import torch

import kvtrim
from kvtrim.bench.machine import provenance
from kvtrim.hf.running import plain_cache

METHODS = ["transformers", "full", "snapkv"]


def timed(model, ids, method: str) -> dict[str, float]:
    """One prefill: wall and processor seconds."""
    if method == "transformers":
        return _seconds(lambda: model(ids, past_key_values=plain_cache(model), logits_to_keep=1))
    with kvtrim.attach(model):
        cache = kvtrim.Cache(model, method, 512)
        return _seconds(lambda: model(ids, past_key_values=cache, logits_to_keep=1))


def _seconds(run: Callable[[], object]) -> dict[str, float]:
    wall, processor = perf_counter(), process_time()
    with torch.no_grad():
        run()
    return {"wall_s": perf_counter() - wall, "processor_s": process_time() - processor}


def main() -> None:
    """Run and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("experiments/core_speed"))
    given = parser.parse_args()
    torch.set_num_threads(2)
    model, _ = kvtrim.load()
    ids = torch.randint(5000, 40000, (1, given.length))
    runs: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    for method in METHODS:
        timed(model, ids, method)  # warm-up
    for number in range(given.rounds):
        for method in METHODS if number % 2 == 0 else METHODS[::-1]:
            runs[method].append(timed(model, ids, method))
    record = {"machine": provenance(model.device), "length": given.length, "runs": runs}
    for clock in ("wall_s", "processor_s"):
        plain = [run[clock] for run in runs["transformers"]]
        for method in METHODS[1:]:
            own = [run[clock] for run in runs[method]]
            ratio = median(a / b for a, b in zip(own, plain, strict=True))
            record[f"{method} to plain, {clock}"] = ratio
            print(f"{method}: {ratio:.3f} of plain ({clock})")
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "prefill_pairs.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
