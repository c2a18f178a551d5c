"""Word needles, question-aware: what each method still finds at each budget.

Every prompt is essays of about 2,000 tokens with one planted sentence, and the question for it.
The prompt is read once; each method and budget continues from that recording, which is the cache
of a prefill of its own.

    python experiments/needles.py --data DIR [--prompts 24] [--part 1/1] [--out FOLDER]

A run that was cut off goes on where it stopped; parts of it may run side by side.
DIR holds essays/paul_graham.txt.gz. Writes needles.jsonl (one line per prompt, method and
budget), needles.json (the run's record) and needles.md (the table).
"""

import argparse
import json
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

import torch

import kvtrim
from kvtrim.bench.provenance import provenance
from kvtrim.hf.replay import record
from kvtrim.prompts import encode_context, encode_question, frame
from prompts import needles

METHODS = "random streaming-llm knorm h2o tova snapkv pyramidkv adakv chunkkv".split()
KEEPS = [1024, 512, 256]
NEW_TOKENS = 20


def answer(model, tokenizer, recording, cache, words) -> str:
    """Greedy continuation of a recorded prompt in lower case, until it ends or has the words."""
    token = recording.logits.argmax(-1, keepdim=True)
    out = [int(token)]
    with torch.no_grad():
        while len(out) < NEW_TOKENS and out[-1] != tokenizer.eos_token_id:
            token = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
            out.append(int(token))
            if all(word in tokenizer.decode(out).lower() for word in words):
                break
    return tokenizer.decode(out, skip_special_tokens=True).lower()


def measured(model, tokenizer, data: Path, count: int, length: int, wanted: set[int]):
    """The rows of each wanted prompt: one for every method and budget."""
    around = frame(tokenizer)
    tries = [("full", None), *((method, keep) for method in METHODS for keep in KEEPS)]
    for number, asked in enumerate(needles(tokenizer, data, count, length)):
        if number not in wanted:
            continue
        rows = []
        read_first = encode_context(tokenizer, around, asked.context)
        prompt = read_first.with_question(encode_question(tokenizer, around, asked.question))
        recording = record(model, torch.tensor([prompt.ids]), prompt.spans)
        for method, keep in tries:
            cache = recording.cache(method, 1 if keep is None else keep)
            row = {"prompt": number, "method": method, "keep": keep, "tokens": len(prompt.ids)}
            row |= {"held_bytes": cache.held_bytes, "full_bytes": cache.full_bytes}
            text = answer(model, tokenizer, recording, cache, asked.words)
            rows.append(
                row | {"recall": mean(word in text for word in asked.words), "answer": text}
            )
        yield rows


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    text = [
        f"Word recall over {len({row['prompt'] for row in rows})} prompts of "
        f"{mean(r['tokens'] for r in rows):.0f} tokens, question-aware, greedy:",
        "mean ± standard error. Held: bytes in the store right after the prompt, as a share of",
        "the keys and values of the full cache.\n",
        "| method | " + " | ".join(f"keep {keep} | held" for keep in KEEPS) + " |",
        "|---|" + "---:|---:|" * len(KEEPS),
    ]
    for method in ["full", *METHODS]:
        cells = []
        for keep in KEEPS:
            own = [r for r in rows if r["method"] == method and r["keep"] in (keep, None)]
            recall = [r["recall"] for r in own]
            held = mean(r["held_bytes"] / r["full_bytes"] for r in own)
            spread = stdev(recall) / sqrt(len(recall)) if len(recall) > 1 else float("nan")
            cells += [f"{mean(recall):.2f} ± {spread:.2f}", f"{100 * held:.1f}%"]
        text.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def main() -> None:
    """Run and write the three files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--length", type=int, default=2000)
    parser.add_argument("--part", default="1/1", help="2/3: every third prompt from the second")
    parser.add_argument("--out", type=Path, default=Path("experiments/needles"))
    given = parser.parse_args()
    model, tokenizer = kvtrim.load()
    given.out.mkdir(parents=True, exist_ok=True)
    run = {"machine": provenance(model.device), "model": "smollm2", "protocol": "question-aware"}
    run |= {"prompts": given.prompts, "length": given.length, "new_tokens": NEW_TOKENS, "seed": 0}
    (given.out / "needles.json").write_text(json.dumps(run, indent=1) + "\n")
    path, (part, parts) = given.out / "needles.jsonl", map(int, given.part.split("/"))
    done = {row["prompt"] for row in written(path)}
    wanted = {n for n in range(given.prompts) if n % parts == part - 1} - done
    with kvtrim.attach(model), path.open("a") as lines:
        for rows in measured(model, tokenizer, given.data, given.prompts, given.length, wanted):
            lines.write("".join(json.dumps(row) + "\n" for row in rows))
            lines.flush()
            print(f"prompt {rows[0]['prompt'] + 1} of {given.prompts}", flush=True)
    (given.out / "needles.md").write_text(table(written(path)))


def written(path: Path) -> list[dict]:
    """The rows that earlier runs wrote."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
