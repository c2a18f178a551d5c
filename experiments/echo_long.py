"""echo beyond what its table was fitted on: chunks of any size, and long generation.

    python experiments/echo_long.py --data DIR [--part chunks] [--part decode]
        [--out experiments/echo_long]

chunks: 8,000 tokens of essays, read whole and in chunks of two sizes and cut at the end to a
        quarter (question-agnostic): how many entries of the model differ.
decode: after 1,000 tokens of essays cut to 512 entries per head, 2,000 more tokens are fed one by
        one under `every=64`, to echo and to snapkv in turn: the most that is held (of the budget
        and 63 tokens that may come between two cuts), and milliseconds per token, in turn.

DIR holds essays/. SmolLM2-135M, fp32. Writes PART.json with the run's record.
"""

import argparse
import gzip
import json
import re
import time
from pathlib import Path
from statistics import median

import torch

import kvtrim
from kvtrim.bench.provenance import provenance
from kvtrim.files import replace
from kvtrim.hf.generate import read


def essays(tokenizer, data: Path, count: int) -> torch.Tensor:
    """So many tokens of essays."""
    with gzip.open(data / "essays" / "paul_graham.txt.gz", "rt") as file:
        text = re.sub(r"<<<ESSAY \d\d \S+>>>\n", "", file.read(count * 10))
    return torch.tensor([tokenizer(text).input_ids[:count]])


def entries(cache) -> set[tuple[int, int, int]]:
    """Layer, head and position of everything that is held."""
    found = set()
    for layer, store in enumerate(cache.session.state.stores()):
        columns, lengths = store.copy().dense()
        for head, count in enumerate(lengths[0].tolist()):
            found |= {(layer, head, at) for at in columns["positions"][0, head, :count].tolist()}
    return found


def chunks(model, ids: torch.Tensor, sizes: list[int]) -> dict:
    """What is kept for each size of chunks, beside what is kept of a prompt read whole."""
    keep, kept = ids.shape[1] // 4, {}
    for size in sizes:
        cache = kvtrim.Cache(model, "echo", keep, prompt_tokens=ids.shape[1])
        read(model, ids, cache, size)
        kept[size] = entries(cache)
        held = {"held_bytes": cache.held_bytes, "full_bytes": cache.full_bytes}
    whole = kept[sizes[0]]
    differ = {str(size): len(whole - own) for size, own in kept.items()}
    return {"tokens": ids.shape[1], "keep": keep, "entries": len(whole), "differ": differ} | held


def decode(model, ids: torch.Tensor, prompt: int, keep: int, every: int) -> dict:
    """Entries held at most and milliseconds per token of echo and snapkv, steps in turn."""
    caches = {name: kvtrim.Cache(model, name, keep, every=every) for name in ("snapkv", "echo")}
    for cache in caches.values():
        read(model, ids[:, :prompt], cache)
    heads = model.config.num_hidden_layers * model.config.num_key_value_heads
    took, most = {name: [] for name in caches}, dict.fromkeys(caches, 0)
    with torch.no_grad():
        for step in range(prompt, ids.shape[1]):
            for name in [*caches][:: 1 if step % 2 else -1]:
                start = time.perf_counter()
                token = ids[:, step : step + 1]
                model(input_ids=token, past_key_values=caches[name], logits_to_keep=1)
                took[name].append(time.perf_counter() - start)
                held = sum(int(each.sum()) for each in caches[name].entries())
                most[name] = max(most[name], held)
    blocks = {
        name: [sum(times[at : at + every]) for at in range(0, len(times) - every, every)]
        for name, times in took.items()
    }
    pairs = zip(blocks["echo"], blocks["snapkv"], strict=True)
    return {
        "prompt": prompt,
        "tokens": ids.shape[1] - prompt,
        "keep": keep,
        "every": every,
        "most_entries_per_head": {name: count / heads for name, count in most.items()},
        "bound": keep + every - 1,
        "ms_per_token": {name: 1e3 * median(own) / every for name, own in blocks.items()},
        "echo_to_snapkv": median(own / other for own, other in pairs),
    }


def main() -> None:
    """Measure the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--part", action="append", choices=["chunks", "decode"])
    parser.add_argument("--tokens", type=int, default=2000, help="generated")
    parser.add_argument("--length", type=int, default=8000, help="of what is read in chunks")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("experiments/echo_long"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, tokenizer = kvtrim.load()
    given.out.mkdir(parents=True, exist_ok=True)
    with kvtrim.attach(model):
        for part in given.part or ["chunks", "decode"]:
            if part == "chunks":
                sizes = [given.length, 1024, 300]
                found = chunks(model, essays(tokenizer, given.data, given.length), sizes)
            else:
                ids = essays(tokenizer, given.data, 1000 + given.tokens)
                found = decode(model, ids, 1000, 512, 64)
            place = {"provenance": provenance(model.device), "threads": given.threads}
            content = json.dumps(found | place, indent=1) + "\n"
            replace(given.out / f"{part}.json", content.encode())
            print(json.dumps(found, indent=1), flush=True)


if __name__ == "__main__":
    main()
