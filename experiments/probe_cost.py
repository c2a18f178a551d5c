"""What kvzip's probe and h2o's sums cost beside a plain prefill, all in turn in one run.

    python experiments/probe_cost.py [--length 4000] [--layers 6] [--rounds 5] [--out FOLDER]

SmolLM2-135M's shape with random weights, fp32, one thread. "second product" is kvzip with its
scores worked out apart from attention, as before; both must keep the same entries. Process time
next to wall time, since the former hardly notices what else the machine does.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import kvtrim
from kvtrim.bench.provenance import provenance
from kvtrim.engine.cuts import Cuts
from kvtrim.hf.generate import plain_cache
from kvtrim.hf.models.random import build

OBSERVE = Cuts.observe


def apart(self: Cuts, *given: Any) -> None:
    """`Cuts.observe` without leave to work out attention on the way."""
    OBSERVE(self, *given[:4])


def reading(model: Any, ids: torch.Tensor, name: str) -> tuple[dict[str, float], Any]:
    """Seconds of one prompt under a method, and the cache."""
    method = name.partition(",")[0]
    Cuts.observe = apart if name.endswith("second product") else OBSERVE
    cache = plain_cache(model) if name == "plain" else kvtrim.Cache(model, method, 512)
    wall, process = time.perf_counter(), time.process_time()
    with torch.no_grad():
        if name == "plain":
            model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        else:
            with kvtrim.attach(model):
                model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    process, wall = time.process_time() - process, time.perf_counter() - wall
    Cuts.observe = OBSERVE
    return {"process_s": process, "wall_s": wall}, cache


def entries(cache: Any) -> list[list[int]]:
    """Positions that each layer holds, head after head."""
    return [store.copy().buffers["positions"].tolist() for store in cache.session.state.stores()]


def main() -> None:
    """Measure in turn, there and back, and write medians of the rounds' own ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=4000)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "probe_cost")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = build("smollm2-135m", layers=given.layers, dtype="float32", device="cpu")
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5000, 49_000, (1, given.length), generator=draw)
    names = ["plain", "full", "h2o", "kvzip", "kvzip, second product"]
    rounds: list[dict[str, dict[str, float]]] = []
    kept = {name: entries(reading(model, ids, name)[1]) for name in names[3:]}
    for number in range(given.rounds):
        order = reversed(names) if number % 2 else names
        rounds.append({name: reading(model, ids, name)[0] for name in order})

    def over(name: str, clock: str, what: Callable[[float, float], float]) -> float:
        return median(what(x[name][clock], x["plain"][clock]) for x in rounds)

    rows = [
        {
            "method": name,
            "process_s": median(x[name]["process_s"] for x in rounds),
            "process_ratio": over(name, "process_s", lambda own, plain: own / plain),
            "wall_ratio": over(name, "wall_s", lambda own, plain: own / plain),
        }
        for name in names
    ]
    for name in names[3:]:
        for clock in ("process", "wall"):
            beside = [x[name][f"{clock}_s"] - x["full"][f"{clock}_s"] for x in rounds]
            plain = [x["plain"][f"{clock}_s"] for x in rounds]
            pairs = zip(beside, plain, strict=True)
            probe = median(own / other for own, other in pairs)
            next(row for row in rows if row["method"] == name)[f"probe_{clock}"] = probe
    record = {
        "machine": provenance(torch.device("cpu")),
        "length": given.length,
        "layers": given.layers,
        "same entries": kept[names[3]] == kept[names[4]],
        "rows": rows,
        "rounds": rounds,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "probe_cost.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(rows, indent=1), record["same entries"])


if __name__ == "__main__":
    main()
