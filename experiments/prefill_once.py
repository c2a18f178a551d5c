"""What reading every prompt once is worth: evaluations with one prefill for all, or one for each.

The same samples, methods and budgets are measured both ways, in turn, and the files compared byte
for byte; and a third time with one prefill, answering one by one (`--batch 1`).

    python experiments/prefill_once.py [--samples 4] [--length 1024] [--batch 32] [--repeats 1]
        [--task ruler-niah-single-1] [--method NAME ...] [--keep N ...] [--out DIR]

Writes prefill_once.json (the record and the figures) and prefill_once.md.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import kvtrim
from kvtrim.bench.eval import grid
from kvtrim.bench.eval.evaluate import Subject, evaluate, record
from kvtrim.records.run_folder import INPUTS, SAMPLES, TIMES
from kvtrim.tasks.rows import reader

METHODS = ["snapkv", "adakv", "pyramidkv", "keydiff", "laprox", "criticalkv"]
KEEPS = ["512", "256", "128", "64"]
PROTOCOLS = ("question-agnostic", "question-aware")


def timed(subject: Subject, wanted: grid.Grid, rows, once: bool) -> tuple[float, dict, list]:
    """Seconds of one evaluation, its files, and what it noted of times."""
    with tempfile.TemporaryDirectory() as name:
        folder, start = Path(name) / "run", time.perf_counter()
        evaluate(subject, wanted, rows, folder, once)
        seconds = time.perf_counter() - start
        files = {file: (folder / file).read_bytes() for file in (INPUTS, SAMPLES)}
        return seconds, files, [*map(json.loads, (folder / TIMES).read_text().splitlines())]


def compared(subject: Subject, wanted: grid.Grid, rows, repeats: int) -> dict:
    """Both ways, in turn."""
    ways = {"once": wanted, "each": wanted, "alone": replace(wanted, batch=1)}
    seconds, files, parts = {way: [] for way in ways}, {}, {}
    for number in range(repeats):
        for way in list(ways)[:: -1 if number % 2 else 1]:
            taken, files[way], lines = timed(subject, ways[way], rows, way != "each")
            seconds[way].append(taken)
            parts[way] = {
                "evict_s": sum(line["evict_s"] or 0 for line in lines),
                "decode_s": sum(line["decode_s"] for line in lines),
            }
            print(f"{wanted.protocol}, {way}: {taken:.1f} s, {parts[way]}", flush=True)
    once, each, alone = (median(seconds[way]) for way in ways)
    lines, others = (
        [json.loads(line) for line in files[way][SAMPLES].splitlines()]
        for way in ("once", "alone")
    )
    apart = zip(sorted(lines, key=_key), sorted(others, key=_key), strict=True)
    return {
        "protocol": wanted.protocol,
        "once_s": once,
        "each_s": each,
        "alone_s": alone,
        "ratio": each / once,
        "batch_ratio": alone / once,
        "identical": files["once"] == files["each"],
        "answers_as_alone": sum(one["answer"] == other["answer"] for one, other in apart),
        "lines": len(lines),
        "ok": sum(line["outcome"] == "ok" for line in lines),
        "prompt_tokens": sum(line["prompt_tokens"] for line in lines) / len(lines),
        "parts": parts,
    }


def _key(line: dict) -> tuple:
    return line["sample"], line["method"], line["keep"]


def main() -> None:
    """Run it and write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--task", default="ruler-niah-single-1")
    parser.add_argument("--method", action="append", help="repeat for several")
    parser.add_argument("--keep", action="append", help="repeat for several")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, default=Path("experiments/prefill_once"))
    given = parser.parse_args()
    subject = Subject(given.model, *kvtrim.load(given.model))
    cells, rows = grid.cells(given.method or METHODS, given.keep or KEEPS), reader(given.data)
    tasks, found = grid.tasks([given.task]), []
    for protocol in PROTOCOLS:
        wanted = grid.Grid(tasks, cells, protocol, given.samples, given.length, batch=given.batch)
        timed(subject, grid.Grid(tasks, cells[:2], protocol, 1, 400), rows, once=True)  # warm up
        found.append(compared(subject, wanted, rows, given.repeats))
    given.out.mkdir(parents=True, exist_ok=True)
    run = record(subject, wanted, rows) | {"protocol": PROTOCOLS, "rows": found}
    text = json.dumps(run, indent=1) + "\n"
    (given.out / "prefill_once.json").write_text(text)
    (given.out / "prefill_once.md").write_text(page(run))


def page(run: dict) -> str:
    """The figures in words."""
    machine, lines = run["machine"], []
    head = (
        f"# One prefill for all methods\n\n{run['model']['name']} ({run['model']['dtype']}), "
        f"{machine['device']}, {machine['threads']} thread(s). {len(run['methods']) - 1} caches "
        f"beside the full one, {run['limit']} samples, {run['batch']} answers at once. Seconds of "
        "whole evaluations, answers and likelihoods included.\n\n"
        "| protocol | tokens | each, s | once, s | ratio | same files | once, one by one, s | "
        "ratio | same answers |\n|---|---:|---:|---:|---:|---|---:|---:|---|\n"
    )
    for row in run["rows"]:
        same = "yes, byte for byte" if row["identical"] else "NO"
        lines.append(
            f"| {row['protocol']} | {row['prompt_tokens']:.0f} | {row['each_s']:.1f} | "
            f"{row['once_s']:.1f} | x{row['ratio']:.2f} | {same} | {row['alone_s']:.1f} | "
            f"x{row['batch_ratio']:.2f} | {row['answers_as_alone']} of {row['lines']} |\n"
        )
    return head + "".join(lines)


if __name__ == "__main__":
    main()
