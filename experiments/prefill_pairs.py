"""Prefill of plain transformers and of kvtrim in turn, so that a drifting machine disturbs least.

    python experiments/prefill_pairs.py [--length 4000 --length 8000] [--rounds 5]
        [--only NAME ...] [--out experiments/fast_prefill]

Every round runs every candidate once, forwards and backwards in turn; a ratio is the median over
rounds of a candidate's seconds to those of plain transformers in the same round. Writes
prefill.json (wall and processor seconds of every run, and the record) and prefill.md.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch

import kvtrim
from kvtrim.bench.provenance import provenance
from kvtrim.hf.generate import plain_cache

PLAIN = "transformers"
CANDIDATES: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "snapkv, 512": {"method": "snapkv", "keep": 512},
    "fastkv, 512, T = 512": {"method": "fastkv", "keep": 512, "layer": 14, "tokens": 512},
    "fastkv, 512, T = 20%": {"method": "fastkv", "keep": 512, "layer": 14},
    "gemfilter, 512": {"method": "gemfilter", "keep": 512},
    "pyramidinfer, 40%": {"method": "pyramidinfer", "keep": 0.4},
    "echo, 25%": {"method": "echo", "keep": 0.25},
    "echo, values and biases, 25%": {"method": "echo", "keep": 0.25, "refit": "values+bias"},
    "kvzip, 25%": {"method": "kvzip", "keep": 0.25},
}


def timed(model, ids, candidate: str) -> dict[str, float]:
    """One prefill: wall and processor seconds, and what is held then."""
    if candidate == PLAIN:
        return _seconds(lambda: model(ids, past_key_values=plain_cache(model), logits_to_keep=1))
    with kvtrim.attach(model):
        cache = kvtrim.Cache(model, **CANDIDATES[candidate])
        taken = _seconds(lambda: model(ids, past_key_values=cache, logits_to_keep=1))
    return taken | {"held": cache.held_bytes / cache.full_bytes}


def _seconds(run: Callable[[], object]) -> dict[str, float]:
    wall, processor = perf_counter(), process_time()
    with torch.no_grad():
        run()
    return {"wall_s": perf_counter() - wall, "processor_s": process_time() - processor}


def rounds(model, length: int, count: int, candidates: list[str]) -> dict[str, list[dict]]:
    """Every candidate's runs."""
    ids = torch.randint(5000, 40000, (1, length), generator=torch.Generator().manual_seed(length))
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in candidates}
    for name in candidates:
        timed(model, ids, name)  # warm-up
    for number in range(count):
        for name in candidates if number % 2 == 0 else candidates[::-1]:
            runs[name].append(timed(model, ids, name))
    return runs


def table(length: int, runs: dict[str, list[dict]]) -> str:
    """One length as Markdown."""
    lines = [
        f"{length:,} tokens, medians of {len(runs[PLAIN])} rounds:\n",
        "| candidate | seconds | to plain | spread | to plain, processor time | held |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, own in runs.items():
        wall, processor = (
            [a[clock] / b[clock] for a, b in zip(own, runs[PLAIN], strict=True)]
            for clock in ("wall_s", "processor_s")
        )
        held = f"{100 * own[0]['held']:.1f}%" if "held" in own[0] else "100%"
        lines.append(
            f"| {name} | {median(run['wall_s'] for run in own):.2f} | {median(wall):.3f} | "
            f"{min(wall):.2f} to {max(wall):.2f} | {median(processor):.3f} | {held} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, action="append", help="repeat for several")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, help="these and plain alone")
    parser.add_argument("--out", type=Path, default=Path("experiments/fast_prefill"))
    given = parser.parse_args()
    torch.set_num_threads(2)
    model, _ = kvtrim.load()
    candidates = [PLAIN, *(given.only or CANDIDATES)]
    record: dict[str, Any] = {"machine": provenance(model.device), "candidates": CANDIDATES}
    record["runs"], texts = {}, []
    for length in given.length or [4000, 8000]:
        record["runs"][length] = runs = rounds(model, length, given.rounds, candidates)
        texts.append(table(length, runs))
        print(texts[-1], flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "prefill.json").write_text(json.dumps(record, indent=1) + "\n")
    head = (
        "Prefill of SmolLM2-135M, fp32, two CPU threads, random prompts, the candidates in turn.\n"
    )
    (given.out / "prefill.md").write_text("\n".join([head, *texts]))


if __name__ == "__main__":
    main()
