"""KVzip's three ways of dealing its budget, beside methods that do not read again.

Word needles in essays of 1,500 tokens, question-agnostic: KL of the answer's token distributions
from those of the full cache, for several numbers of entries kept.

    python experiments/kvzip_budgets.py --data DIR [--prompts 8] [--out experiments/kvzip_budgets]

Writes kvzip_budgets.json (every figure and the run's record) and kvzip_budgets.md.
"""

import argparse
import json
from pathlib import Path
from statistics import mean

import torch
from quality import forced

import kvtrim
from kvtrim.bench.provenance import provenance
from kvtrim.hf.replay import record
from kvtrim.prompts import encode_context, encode_question, encode_text, frame
from prompts import needles

KEEPS = [150, 300, 450, 750]
CANDIDATES = {
    "kvzip": ("kvzip", {}),
    "kvzip, budget per layer": ("kvzip", {"preset": "layer"}),
    "kvzip, budget per head": ("kvzip", {"preset": "uniform"}),
    "snapkv": ("snapkv", {}),
    "keydiff": ("keydiff", {}),
    "knorm": ("knorm", {}),
}


def main() -> None:
    """Run and write the two files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("experiments/kvzip_budgets"))
    given = parser.parse_args()
    model, tokenizer = kvtrim.load()
    rows = []
    with kvtrim.attach(model):
        for asked in needles(tokenizer, given.data, given.prompts, 1500, seed=2):
            around = frame(tokenizer)
            read_first = encode_context(tokenizer, around, asked.context)
            prompt = read_first.with_question(encode_question(tokenizer, around, asked.question))
            answer = encode_text(tokenizer, asked.answer)
            recording = record(model, torch.tensor([prompt.context]))
            full = forced(model, recording.cache("full", 1), prompt.question, answer)
            for name, (method, settings) in CANDIDATES.items():
                for keep in KEEPS:
                    cache = recording.cache(method, keep, tokenizer=tokenizer, **settings)
                    got = forced(model, cache, prompt.question, answer)
                    kl = float((full.exp() * (full - got)).sum(dim=-1).mean())
                    rows.append({"candidate": name, "keep": keep, "kl": kl})
            print(f"{len(rows)} figures", flush=True)
    run = {"machine": provenance(model.device), "model": "smollm2", "seed": 2, "rows": rows}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "kvzip_budgets.json").write_text(json.dumps(run, indent=1) + "\n")
    lines = [
        f"KL from the full cache, nats, question-agnostic, {given.prompts} needles in essays of "
        "1,500 tokens.\n",
        "| candidate | " + " | ".join(f"keep {keep}" for keep in KEEPS) + " |",
        "|---|" + "---:|" * len(KEEPS),
    ]
    for name in CANDIDATES:
        own = [r for r in rows if r["candidate"] == name]
        cells = [f"{mean(r['kl'] for r in own if r['keep'] == keep):.3f}" for keep in KEEPS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    (given.out / "kvzip_budgets.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
