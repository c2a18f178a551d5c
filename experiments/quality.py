"""What every method costs in answers: likelihood, divergence and words, under both protocols.

Each prompt is read once; every method and budget that leaves the prefill as it is continues from
that recording, the others read the prompt themselves. The answer is then fed as it should be, and
compared with what the full cache makes of it:

    loss    log-likelihood of the answer, full minus method, nats per token (0 is the full cache)
    KL      divergence of the next-token distributions from those of the full cache, nats
    words   share of the answer's words of which every token was the most likely one

Under question-aware the first token of the answer is not judged: it comes from the prefill, which
most methods leave as it is. A budget that a method cannot reach leaves no row.

    python experiments/quality.py --data DIR [--needles 17] [--rows 15] [--length 2000]
        [--method NAME ...] [--keep N ...] [--out experiments/quality]

DIR holds essays/ and longbench_mini/. Writes quality.jsonl (one line per prompt, protocol, method
and budget), quality.json (the run's record) and quality.md (the tables). A run that was cut off
goes on where it stopped.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import figures
import torch

import kvtrim
from kvtrim.bench.provenance import provenance
from kvtrim.errors import BudgetError
from kvtrim.hf.replay import Recording, record
from kvtrim.methods.settings import find
from kvtrim.prompts import encode_context, encode_question, encode_text, frame
from prompts import Asked, longbench, needles

KEEPS = [1024, 512, 256, 128]
PROTOCOLS = ("question-aware", "question-agnostic")


def forced(model, cache, lead: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probabilities [T, V] before each answer token that `lead` or the answer leads to."""
    ids = torch.tensor([lead + answer[:-1]])
    with torch.no_grad():
        logits = model(ids, past_key_values=cache).logits[0]
    return logits[max(0, len(lead) - 1) :].float().log_softmax(dim=-1)


def words_right(tokenizer, answer: list[int], best: list[bool], words: tuple[str, ...]) -> float:
    """Share of the words all of whose tokens were the most likely ones."""
    text, spans = "", []
    for token, right in zip(answer, best, strict=True):
        piece = tokenizer.decode([token])
        spans.append((len(text), len(text) + len(piece), right))
        text += piece
    found = []
    for word in words:
        at = text.find(word)
        own = [right for start, end, right in spans if start < at + len(word) and end > at]
        found.append(at >= 0 and all(own))
    return mean(found)


def measured(
    model, tokenizer, asked: Asked, protocol: str, methods: list[str], keeps: list[int]
) -> Iterator[dict[str, Any]]:
    """One row for every method and budget."""
    around = frame(tokenizer)
    read_first = encode_context(tokenizer, around, asked.context)
    prompt = read_first.with_question(encode_question(tokenizer, around, asked.question))
    answer = encode_text(tokenizer, asked.answer)
    aware = protocol == "question-aware"
    named = {name: units for name, units in prompt.spans.items() if aware or name != "question"}
    recording = record(model, torch.tensor([prompt.ids if aware else prompt.context]), named)
    lead = [] if aware else prompt.question
    judged = answer[1:] if aware else answer
    first = [True] if aware else []
    gold = torch.tensor(judged)
    reference = forced(model, recording.cache("full", 1), lead, answer)
    own = reference.gather(1, gold[:, None])[:, 0]
    for method in methods:
        for keep in keeps if method != "full" else keeps[:1]:
            try:
                cache = cache_of(recording, method, keep, tokenizer)
            except BudgetError:
                continue
            row = {"protocol": protocol, "kind": asked.kind, "method": method, "keep": keep}
            row |= {"tokens": recording.ids.shape[1], "held_bytes": cache.held_bytes}
            row |= {"full_bytes": cache.full_bytes}
            got = forced(model, cache, lead, answer)
            best = first + (got.argmax(dim=-1) == gold).tolist()
            row["loss"] = float((own - got.gather(1, gold[:, None])[:, 0]).mean())
            row["kl"] = float((reference.exp() * (reference - got)).sum(dim=-1).mean())
            row["words"] = words_right(tokenizer, answer, best, asked.words)
            yield row


def cache_of(recording: Recording, method: str, keep: int, tokenizer) -> kvtrim.Cache:
    """The cache after the prompt, replayed where that is the same."""
    if not find(method).propagation.narrows:
        return recording.cache(method, keep, tokenizer=tokenizer)
    cache = kvtrim.Cache(recording.model, method, keep, spans=recording.spans)
    with torch.no_grad():
        recording.model(recording.ids, past_key_values=cache, logits_to_keep=1)
    return cache


def table(rows: list[dict[str, Any]], protocol: str) -> str:
    """One protocol's rows as Markdown."""
    own = [row for row in rows if row["protocol"] == protocol]
    prompts = {row["prompt"] for row in own}
    lines = [
        f"## {protocol}\n",
        f"{len(prompts)} prompts of {mean(r['tokens'] for r in own):.0f} tokens; mean ± standard "
        "error; held as a share of the full cache, measured.\n",
        "| method | keep | held | loss, nats/token | KL, nats | words, needles | words, rows | "
        "prompts |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for method in dict.fromkeys(row["method"] for row in own):
        for keep in sorted({row["keep"] for row in own}, reverse=True):
            cell = [r for r in own if r["method"] == method and r["keep"] == keep]
            if cell:
                held = mean(r["held_bytes"] / r["full_bytes"] for r in cell)
                planted = [r for r in cell if r["kind"] == "needle"]
                others = [r for r in cell if r["kind"] != "needle"]
                label = "all" if method == "full" else str(keep)
                lines.append(
                    f"| {method} | {label} | {100 * held:.1f}% | {spread(cell, 'loss')} | "
                    f"{spread(cell, 'kl')} | {spread(planted, 'words')} | "
                    f"{spread(others, 'words')} | {len(cell)} |"
                )
    return "\n".join(lines) + "\n"


def spread(rows: list[dict[str, Any]], name: str) -> str:
    """Mean ± standard error of one figure."""
    return figures.spread([row[name] for row in rows], 2)


def main() -> None:
    """Run, or go on with a run, and write the three files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--needles", type=int, default=17)
    parser.add_argument("--rows", type=int, default=15)
    parser.add_argument("--length", type=int, default=2000)
    parser.add_argument("--method", action="append", help="all by default; repeat for several")
    parser.add_argument("--keep", type=int, action="append", help="repeat for several")
    parser.add_argument("--out", type=Path, default=Path("experiments/quality"))
    given = parser.parse_args()
    model, tokenizer = kvtrim.load()
    planted = needles(tokenizer, given.data, given.needles, given.length, seed=1)
    prompts = [*planted, *longbench(tokenizer, given.data, given.rows, given.length + 300)]
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "quality.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["prompt"], row["protocol"], row["method"]) for row in rows}
    methods, keeps = given.method or list(kvtrim.METHODS), given.keep or KEEPS
    run = {"machine": provenance(model.device), "model": "smollm2", "keeps": keeps, "seed": 1}
    run |= {"needles": given.needles, "rows": given.rows, "length": given.length}
    run |= {"methods": methods}
    record_path = given.out / "quality.json"
    runs = json.loads(record_path.read_text())["runs"] if record_path.exists() else []
    record_path.write_text(json.dumps({"runs": [*runs, run]}, indent=1) + "\n")
    order = sorted(range(len(prompts)), key=lambda i: (i % max(1, given.needles), i))
    with kvtrim.attach(model), path.open("a") as file:
        for number in order:
            for protocol in PROTOCOLS:
                left = [m for m in methods if (number, protocol, m) not in done]
                if not left:
                    continue
                found = measured(model, tokenizer, prompts[number], protocol, left, keeps)
                new = [{"prompt": number, **row} for row in found]
                rows += new
                file.write("".join(json.dumps(row) + "\n" for row in new))
                file.flush()
                print(f"prompt {number + 1} of {len(prompts)}, {protocol}", flush=True)
    text = "\n".join(table(rows, protocol) for protocol in PROTOCOLS)
    (given.out / "quality.md").write_text(text)


if __name__ == "__main__":
    main()
