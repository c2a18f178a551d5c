"""echo and refit beside KVzip and others: what each costs in the likelihood of the answer.

Needles in essays, LongBench rows, RULER's tasks and lists of solved problems (a kind of text that
the calibration has none of), read once each and continued from that
recording by every method at 1/32, 1/16, 1/8 and 1/4 of the context's entries; the answer is fed as
it should be.

    python experiments/echo.py --data DIR [--needles 6] [--rows 6] [--ruler 1] [--length 1400]
        [--longest 2300] [--exercises 0] [--cell NAME ...] [--share N ...] [--table FILE]
        [--aware] [--base CELL] [--model smollm2] [--seed 7] [--out experiments/echo]

The question comes later (question-agnostic), or is read with the context (--aware). DIR holds
essays/ and longbench_mini/. Writes echo.jsonl (one line per prompt, cell and budget), echo.json
(the run's record) and echo.md (the tables: means, standard errors, and differences to --base,
kvzip unless it says otherwise, on the same prompts). A run that was cut off goes on where it
stopped, with cells that it had not then, too.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from time import process_time
from typing import Any

import torch
from figures import spread
from quality import forced

import kvtrim
from kvtrim.bench.provenance import provenance
from kvtrim.hf.replay import record
from kvtrim.prompts import encode_context, encode_question, encode_text, frame
from prompts import Asked, exercises, longbench, needles, ruler

SHARES = (32, 16, 8, 4)
# What refits comes before what does not: a probe is read once for both then.
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "kvzip, values": ("kvzip", {"refit": "values"}),
    "kvzip, values and biases": ("kvzip", {"refit": "values+bias"}),
    "kvzip": ("kvzip", {}),
    "echo": ("echo", {}),
    "echo, values": ("echo", {"refit": "values"}),
    "echo, values and biases": ("echo", {"refit": "values+bias"}),
    "kvzip, demoted": ("kvzip", {"demote": True}),
    "echo, demoted": ("echo", {"demote": True}),
    "kvzip-plus": ("kvzip-plus", {}),
    "kvgrad, values and biases": ("kvgrad", {"refit": "values+bias"}),
    "kvgrad": ("kvgrad", {}),
    "echo-window": ("echo-window", {}),
    "echo-window, values and biases": ("echo-window", {"refit": "values+bias"}),
    "headkv, values and biases": ("headkv", {"refit": "values+bias"}),
    **{
        name: (name, {})
        for name in (
            "headkv",
            "adakv",
            "laprox",
            "criticalkv",
            "lava",
            "defensivekv",
            "layer-defensivekv",
            "expected-attention",
            "snapkv",
        )
    },
}
KINDS = {"needles": "needle", "RULER": "ruler-", "exercises": "exercise "}


def measured(
    model: Any,
    tokenizer: Any,
    asked: Asked,
    cells: Sequence[str],
    table: str | None,
    shares: Sequence[int] = SHARES,
    aware: bool = False,
) -> list[dict[str, Any]]:
    """One row for every cell and budget."""
    around = frame(tokenizer)
    read_first = encode_context(tokenizer, around, asked.context)
    prompt = read_first.with_question(encode_question(tokenizer, around, asked.question))
    lead = encode_text(tokenizer, asked.prefix)
    answer = encode_text(tokenizer, asked.answer)
    read = prompt.context + prompt.question if aware else prompt.context
    lead = lead if aware else prompt.question + lead
    recording = record(model, torch.tensor([read]), (prompt if aware else read_first).spans)
    reference = forced(model, recording.cache("full", 1), lead, answer)
    gold = torch.tensor(answer)[-len(reference) :]  # what a prompt's own last token leads to is
    own, rows = reference.gather(1, gold[:, None])[:, 0], []  # not judged
    for label in cells:
        method, settings = CELLS[label]
        if method.startswith("echo") and table is not None:
            settings = {"table": table} | settings
        for share in shares:
            keep, start = len(read) // share, process_time()
            cache = recording.cache(method, keep, tokenizer=tokenizer, **settings)
            took = process_time() - start
            held = cache.held_bytes / cache.full_bytes
            got = forced(model, cache, lead, answer)
            row = {"kind": asked.kind, "cell": label, "share": share, "held": held, "s": took}
            row["loss"] = float((own - got.gather(1, gold[:, None])[:, 0]).mean())
            row["kl"] = float((reference.exp() * (reference - got)).sum(dim=-1).mean())
            rows.append(row | {"tokens": len(read)})
    return rows


def suite(kind: str) -> str:
    """What a prompt's kind belongs to."""
    return next((name for name, own in KINDS.items() if kind.startswith(own)), "LongBench")


def table_of(rows: list[dict[str, Any]], base: str = "kvzip", aware: bool = False) -> str:
    """The rows as Markdown: one table of all prompts, and one of divergences by suite."""
    protocol = "question-aware" if aware else "question-agnostic"
    prompts = {row["prompt"]: row for row in rows}
    suites = [suite(row["kind"]) for row in prompts.values()]
    parts = ", ".join(f"{suites.count(name)} of {name}" for name in dict.fromkeys(suites))
    lines = [
        f"{len(prompts)} prompts ({parts}) of {mean(p['tokens'] for p in prompts.values()):.0f} "
        f"tokens, {protocol}; KL of the answer's token distributions to the full cache's "
        "and loss above it, nats per token; mean ± standard error; the last two columns are "
        f"differences to {base} on the same prompts.\n",
        f"| kept | cell | prompts | held | KL | loss | KL - {base} | loss - {base} |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    of_suites = ["", f"Loss by suite, and difference to {base}:\n"]
    of_suites.append(f"| kept | cell | {' | '.join(dict.fromkeys(suites))} |")
    of_suites.append("|---|---|" + "---:|" * len(set(suites)))
    cells = list(dict.fromkeys([*CELLS, *(row["cell"] for row in rows)]))
    for share in SHARES:
        others = {r["prompt"]: r for r in rows if r["cell"] == base and r["share"] == share}
        for cell in cells:
            own = [r for r in rows if r["cell"] == cell and r["share"] == share]
            if not own:
                continue
            pairs = [(r, others[r["prompt"]]) for r in own if r["prompt"] in others]
            shown = [
                f"1/{share}",
                cell,
                str(len(own)),
                f"{100 * mean(r['held'] for r in own):.1f} %",
                spread([r["kl"] for r in own]),
                spread([r["loss"] for r in own]),
                *(spread([r[name] - b[name] for r, b in pairs]) for name in ("kl", "loss")),
            ]
            lines.append("| " + " | ".join(shown) + " |")
            by = []
            for name in dict.fromkeys(suites):
                loss = spread([r["loss"] for r in own if suite(r["kind"]) == name])
                apart = [r["loss"] - b["loss"] for r, b in pairs if suite(r["kind"]) == name]
                by.append(f"{loss} ({spread(apart)})" if apart else loss)
            of_suites.append(f"| 1/{share} | {cell} | {' | '.join(by)} |")
    return "\n".join([*lines, *of_suites]) + "\n"


def turns(*suites: Sequence[Asked]) -> list[Asked]:
    """Prompts of all suites in turn, so that any first part of them has every suite."""
    longest = max(map(len, suites))
    return [own[turn] for turn in range(longest) for own in suites if turn < len(own)]


def main() -> None:
    """Run, or go on with a run, and write the three files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--needles", type=int, default=6)
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--ruler", type=int, default=1, help="samples of each task")
    parser.add_argument("--exercises", type=int, default=0, help="lists of either kind")
    parser.add_argument("--length", type=int, default=1400)
    parser.add_argument("--longest", type=int, default=2300, help="of a row")
    parser.add_argument("--cell", action="append", choices=[*CELLS], help="all by default")
    parser.add_argument("--share", type=int, action="append", help="all of 32, 16, 8, 4")
    parser.add_argument("--table", help="a table of echo; by default the model's own")
    parser.add_argument("--aware", action="store_true", help="the question is read with it")
    parser.add_argument("--model", default="smollm2", help="another one needs its own --table")
    parser.add_argument("--base", default="kvzip", choices=[*CELLS])
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("experiments/echo"))
    given = parser.parse_args()
    model, tokenizer = kvtrim.load(given.model)
    prompts = turns(
        [*needles(tokenizer, given.data, given.needles, given.length, seed=given.seed)],
        longbench(tokenizer, given.data, given.rows, given.longest),
        ruler(tokenizer, given.data, given.length, given.ruler, seed=given.seed),
        exercises(tokenizer, given.data, given.length, given.exercises, seed=given.seed),
    )
    given.out.mkdir(parents=True, exist_ok=True)
    path, cells = given.out / "echo.jsonl", given.cell or [*CELLS]
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    run = {
        "machine": provenance(model.device),
        "model": Path(given.model).name,
        "seed": given.seed,
        "aware": given.aware,
    }
    run |= {"needles": given.needles, "rows": given.rows, "ruler": given.ruler}
    run |= {
        "exercises": given.exercises,
        "length": given.length,
        "longest": given.longest,
        "cells": cells,
    }
    run |= {"shares": given.share or SHARES, "table": given.table}
    (given.out / "echo.json").write_text(json.dumps(run, indent=1) + "\n")
    with kvtrim.attach(model), path.open("a") as file:
        for number, asked in enumerate(prompts):
            done = {row["cell"] for row in rows if row["prompt"] == number}
            left = [cell for cell in cells if cell not in done]
            if left:
                more = given.table, given.share or SHARES, given.aware
                found = measured(model, tokenizer, asked, left, *more)
                new = [{"prompt": number, **row} for row in found]
                rows += new
                file.write("".join(json.dumps(row) + "\n" for row in new))
                file.flush()
                (given.out / "echo.md").write_text(table_of(rows, given.base, given.aware))
                print(f"prompt {number + 1} of {len(prompts)}", flush=True)
    (given.out / "echo.md").write_text(table_of(rows, given.base, given.aware))


if __name__ == "__main__":
    main()
