"""Any method that kvtrim and NVIDIA's kvpress both have, on the same prompts: loss and held bytes.

    python -m venv PRESS && PRESS/bin/pip install torch==2.13.0 kvpress==0.5.5 'transformers<5.3'
    python experiments/kvpress_pairs.py --data DIR --kvpress PRESS/bin/python
        [--method snapkv --method kvzip] [--needles 8] [--rows 4] [--ruler 0] [--length 1300]

kvpress needs an older transformers, so it runs as a process of its own on the model that kvtrim
saved for it. Both get the same token ids: the chat template and the context, then the question
and the right answer (question-agnostic), and keep equally many entries: the share is rounded down
to whole entries per head, as kvtrim does, before either sees it. The loss is what the answer's
likelihood falls short of the full cache's, nats per token, as kvtrim's own full cache has it; held
bytes are those of the tensors that each side's cache holds when the context was read.

DIR holds essays/ and longbench_mini/. Writes kvpress_pairs.jsonl, .json and .md under --out.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import mean

import torch
import transformers
from figures import spread

import kvtrim
from kvtrim.bench.provenance import provenance
from kvtrim.files import replace
from kvtrim.prompts import encode, encode_text, frame
from prompts import longbench, needles, ruler

SHARES = (0.06, 0.12, 0.25)


def ours(model, tokenizer, prompt, method, keep):
    """As kvpress_side's `measured`, by kvtrim."""
    cache = kvtrim.Cache(model, method, keep, tokenizer=tokenizer)
    start = time.perf_counter()
    with torch.no_grad(), kvtrim.attach(model):
        model(torch.tensor([prompt["context"]]), past_key_values=cache, logits_to_keep=1)
        seconds, held = time.perf_counter() - start, cache.held_bytes
        ids = torch.tensor([prompt["question"] + prompt["answer"][:-1]])
        logits = model(ids, past_key_values=cache).logits[0]
    gold = torch.tensor(prompt["answer"])
    right = logits[-len(gold) :].float().log_softmax(-1).gather(1, gold[:, None])[:, 0]
    return {"right": right.tolist(), "held_bytes": held, "seconds": seconds}


def table(rows, full, full_bytes):
    """Mean and standard error per method and share, both sides and their difference."""
    lines = [
        f"{len(full)} prompts, question-agnostic; loss above the full cache, nats per token, mean "
        "± standard error; held as a share of the full cache's bytes; last column: paired.\n",
        "| method | share | held, kvpress | held, kvtrim | loss, kvpress | loss, kvtrim | "
        "kvtrim - kvpress |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for method, share in dict.fromkeys((row["method"], row["share"]) for row in rows):
        cell, held = {}, {}
        for side in ("kvpress", "kvtrim"):
            own = [
                r for r in rows if (r["side"], r["method"], r["share"]) == (side, method, share)
            ]
            cell[side] = [full[r["prompt"]] - mean(r["right"]) for r in own]
            held[side] = mean(r["held_bytes"] / full_bytes[r["prompt"]] for r in own)
        apart = [b - a for a, b in zip(cell["kvpress"], cell["kvtrim"], strict=True)]
        figures = [spread(cell["kvpress"]), spread(cell["kvtrim"]), spread(apart)]
        lines.append(
            f"| {method} | {share:.0%} | {held['kvpress']:.1%} | {held['kvtrim']:.1%} | "
            + " | ".join(figures)
            + " |"
        )
    return "\n".join(lines) + "\n"


def main():
    """Measure both sides on every prompt."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--kvpress", required=True, help="a Python that has kvpress")
    parser.add_argument("--method", action="append")
    parser.add_argument("--needles", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--ruler", type=int, default=0, help="samples of each task")
    parser.add_argument("--length", type=int, default=1300)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("experiments/kvpress_pairs"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = kvtrim.load("smollm2")
    asked = [
        *needles(tokenizer, given.data, given.needles, given.length),
        *longbench(tokenizer, given.data, given.rows, given.length + 100),
        *ruler(tokenizer, given.data, given.length, given.ruler),
    ]
    around, prompts = frame(tokenizer), []
    for one in asked:
        prompt = encode(tokenizer, around, one.context, one.question)
        asks = prompt.question + encode_text(tokenizer, one.prefix)
        parts = {"context": prompt.context, "question": asks}
        prompts.append(parts | {"answer": encode_text(tokenizer, one.answer)})
    cells = [(m, s) for m in given.method or ["snapkv", "kvzip"] for s in SHARES]
    rows, full, full_bytes = [], [], []
    for number, prompt in enumerate(prompts):
        whole = ours(model, tokenizer, prompt, "full", 1.0)
        full.append(mean(whole["right"]))
        full_bytes.append(whole["held_bytes"])
        for method, share in cells:
            keep = int(share * len(prompt["context"]))
            row = ours(model, tokenizer, prompt, method, keep)
            row |= {"side": "kvtrim", "prompt": number, "method": method, "share": share}
            rows.append(row)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        told = {"prompts": prompts, "cells": cells, "threads": given.threads}
        (folder / "prompts.json").write_text(json.dumps(told))
        side = Path(__file__).with_name("kvpress_side.py")
        subprocess.run([given.kvpress, str(side), name], check=True)
        lines = (folder / "kvpress.jsonl").read_text().splitlines()
        rows += [json.loads(line) | {"side": "kvpress"} for line in lines]
        versions = json.loads((folder / "kvpress.json").read_text())
    given.out.mkdir(parents=True, exist_ok=True)
    tokens = [len(prompt["context"]) for prompt in prompts]
    record = provenance(torch.device("cpu")) | {"tokens": tokens, "kvpress_side": versions}
    text = table(rows, full, full_bytes)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    replace(given.out / "kvpress_pairs.jsonl", lines.encode())
    replace(given.out / "kvpress_pairs.json", (json.dumps(record, indent=1) + "\n").encode())
    replace(given.out / "kvpress_pairs.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
