"""echo and refit beside KVzip, question-agnostic: what each costs in the likelihood of the answer.

Needles in essays and LongBench rows, read once each and continued from that recording by every
method at 1/16, 1/8 and 1/4 of the context's entries; the answer is fed as it should be.

    python experiments/echo.py --data DIR [--needles 8] [--rows 4] [--length 1500]
        [--cell NAME ...] [--table FILE] [--out experiments/echo]

DIR holds essays/ and longbench_mini/. Writes echo.jsonl (one line per prompt, cell and budget),
echo.json (the run's record) and echo.md (the table: means, standard errors, and differences to
kvzip on the same prompts). A run that was cut off goes on where it stopped.
"""

import argparse
import json
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from time import process_time
from typing import Any

import torch
from quality import forced

import kvtrim
from kvtrim.bench.provenance import provenance
from kvtrim.hf.replay import record
from kvtrim.prompts import encode_context, encode_question, encode_text, frame
from prompts import longbench, needles

SHARES = (16, 8, 4)
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "snapkv": ("snapkv", {}),
    "kvzip": ("kvzip", {}),
    "kvzip-plus": ("kvzip-plus", {}),
    "echo": ("echo", {}),
    "echo, a floor of .3": ("echo", {"floor": 0.3}),
    "echo, values": ("echo", {"refit": "values"}),
    "echo, values and biases": ("echo", {"refit": "values+bias"}),
    "kvzip, values": ("kvzip", {"refit": "values"}),
    "kvzip, values and biases": ("kvzip", {"refit": "values+bias"}),
}


def measured(model, tokenizer, asked, cells, table) -> list[dict[str, Any]]:
    """One row for every cell and budget."""
    around = frame(tokenizer)
    read_first = encode_context(tokenizer, around, asked.context)
    prompt = read_first.with_question(encode_question(tokenizer, around, asked.question))
    answer = encode_text(tokenizer, asked.answer)
    gold = torch.tensor(answer)
    recording = record(model, torch.tensor([prompt.context]))
    reference = forced(model, recording.cache("full", 1), prompt.question, answer)
    own, rows = reference.gather(1, gold[:, None])[:, 0], []
    for label in cells:
        method, settings = CELLS[label]
        if method == "echo" and table is not None:
            settings = settings | {"table": table}
        for share in SHARES:
            keep, start = len(prompt.context) // share, process_time()
            cache = recording.cache(method, keep, tokenizer=tokenizer, **settings)
            took = process_time() - start
            held = cache.held_bytes / cache.full_bytes
            got = forced(model, cache, prompt.question, answer)
            row = {"kind": asked.kind, "cell": label, "share": share, "held": held, "s": took}
            row["loss"] = float((own - got.gather(1, gold[:, None])[:, 0]).mean())
            row["kl"] = float((reference.exp() * (reference - got)).sum(dim=-1).mean())
            rows.append(row | {"tokens": len(prompt.context)})
    return rows


def spread(values: list[float]) -> str:
    """Mean ± standard error."""
    if len(values) < 2:
        return "-"
    return f"{mean(values):.3f} ± {stdev(values) / sqrt(len(values)):.3f}"


def table_of(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    prompts = {row["prompt"]: row["tokens"] for row in rows}
    lines = [
        f"{len(prompts)} prompts of {mean(prompts.values()):.0f} tokens, question-agnostic; KL of "
        "the answer's token distributions to the full cache's and loss above it, nats per token; "
        "mean ± standard error; the last two columns are differences to kvzip on the same "
        "prompts.\n",
        "| kept | cell | held | KL, needles | KL, rows | KL | loss | KL - kvzip | loss - kvzip |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for share in SHARES:
        base = {r["prompt"]: r for r in rows if r["cell"] == "kvzip" and r["share"] == share}
        for cell in CELLS:
            own = [r for r in rows if r["cell"] == cell and r["share"] == share]
            if not own:
                continue
            pairs = [(r, base[r["prompt"]]) for r in own if r["prompt"] in base]
            parts = [[r["kl"] for r in own if (r["kind"] == "needle") is k] for k in (True, False)]
            cells = [
                f"1/{share}",
                cell,
                f"{100 * mean(r['held'] for r in own):.1f} %",
                *map(spread, parts),
                spread([r["kl"] for r in own]),
                spread([r["loss"] for r in own]),
                *(spread([r[name] - b[name] for r, b in pairs]) for name in ("kl", "loss")),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run, or go on with a run, and write the three files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--needles", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1500)
    parser.add_argument("--cell", action="append", choices=[*CELLS], help="all by default")
    parser.add_argument("--table", help="a table of echo; by default the model's own")
    parser.add_argument("--out", type=Path, default=Path("experiments/echo"))
    given = parser.parse_args()
    model, tokenizer = kvtrim.load()
    prompts = [
        *needles(tokenizer, given.data, given.needles, given.length, seed=7),
        *longbench(tokenizer, given.data, given.rows, given.length + 300),
    ]
    given.out.mkdir(parents=True, exist_ok=True)
    path, cells = given.out / "echo.jsonl", given.cell or [*CELLS]
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    run = {"machine": provenance(model.device), "model": "smollm2", "seed": 7}
    run |= {"needles": given.needles, "rows": given.rows, "length": given.length, "cells": cells}
    (given.out / "echo.json").write_text(json.dumps(run, indent=1) + "\n")
    order = sorted(range(len(prompts)), key=lambda i: (i % max(1, given.needles), i))
    with kvtrim.attach(model), path.open("a") as file:
        for number in order:
            done = {row["cell"] for row in rows if row["prompt"] == number}
            left = [cell for cell in cells if cell not in done]
            if left:
                found = measured(model, tokenizer, prompts[number], left, given.table)
                new = [{"prompt": number, **row} for row in found]
                rows += new
                file.write("".join(json.dumps(row) + "\n" for row in new))
                file.flush()
                (given.out / "echo.md").write_text(table_of(rows))
                print(f"prompt {number + 1} of {len(prompts)}", flush=True)
    (given.out / "echo.md").write_text(table_of(rows))


if __name__ == "__main__":
    main()
