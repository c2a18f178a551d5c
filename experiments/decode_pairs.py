"""Milliseconds per token of methods that hold the same bytes, one step of each in turn.

    python experiments/decode_pairs.py [--tokens 2000] [--keep 512] [--steps 150] [--out DIR]

Steps of all candidates are taken alternately, so that a machine that drifts slows them alike; the
ratio is the median over the rounds of a candidate's step to snapkv's in the same round. `short` is
plain transformers after a prompt as long as what the methods hold.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

import kvtrim
from kvtrim.bench.provenance import provenance
from kvtrim.hf.generate import plain_cache, stored_bytes

METHODS = ("snapkv", "adakv", "headkv", "pyramidkv")


def main() -> None:
    """Measure and write decode_pairs.json and decode_pairs.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--keep", type=int, default=512)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("experiments/decode_pairs"))
    given = parser.parse_args()
    torch.set_num_threads(2)
    model, _ = kvtrim.load()
    ids = torch.randint(4000, 40000, (1, given.tokens), generator=torch.Generator().manual_seed(1))
    caches: dict[str, Any] = {"short": plain_cache(model)}
    rounds = []
    with kvtrim.attach(model), torch.no_grad():
        for method in METHODS:
            caches[method] = kvtrim.Cache(model, method, given.keep)
        for name, cache in caches.items():
            prompt = ids[:, : given.keep] if name == "short" else ids
            model(input_ids=prompt, past_key_values=cache, logits_to_keep=1)
        held = {name: stored_bytes(cache)[0] for name, cache in caches.items()}
        for number in range(given.steps + 5):
            took = {}
            for name in [*caches][:: 1 if number % 2 else -1]:
                start = perf_counter()
                model(input_ids=ids[:, :1], past_key_values=caches[name], logits_to_keep=1)
                took[name] = perf_counter() - start
            rounds.append(took)
    rounds = rounds[5:]
    rows = [
        {
            "method": name,
            "held_bytes": held[name],
            "ms_per_token": 1e3 * median(one[name] for one in rounds),
            "to_snapkv": median(one[name] / one["snapkv"] for one in rounds),
        }
        for name in caches
    ]
    record = {"machine": provenance(model.device), "tokens": given.tokens, "keep": given.keep}
    given.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record | {"steps": given.steps, "rows": rows}, indent=1) + "\n"
    (given.out / "decode_pairs.json").write_text(text)
    lines = [
        f"SmolLM2-135M, fp32, two threads, {given.tokens} tokens cut to {given.keep}, "
        f"{given.steps} steps of each in turn; medians.\n",
        "| cache | held | ms/token | to snapkv |",
        "|---|---:|---:|---:|",
    ]
    for row in rows:
        name = f"plain, {given.keep} tokens" if row["method"] == "short" else row["method"]
        figures = f"{row['ms_per_token']:.1f} | {row['to_snapkv']:.3f}"
        lines.append(f"| {name} | {row['held_bytes'] / 2**20:.2f} MiB | {figures} |")
    text = "\n".join(lines) + "\n"
    (given.out / "decode_pairs.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
