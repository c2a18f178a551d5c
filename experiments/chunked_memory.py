"""Peak memory of a prompt read in chunks and cut after each, by its length, beside a full cache.

A small model with random weights and a long context window reads prompts of growing length. The
budget is fixed, so memory should not grow; the full cache beside it shows what would be held.

    python experiments/chunked_memory.py [--lengths 16384 65536] [--chunk 2048] [--keep 1024]
        [--method NAME ...] [--out experiments/chunked_memory]

Every measurement runs in a process of its own: resident memory that was once used is not always
given back. echo gets a table of random numbers, which takes what a fitted one takes. Writes
chunked_memory.json (figures and the run's record) and chunked_memory.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import kvtrim
from kvtrim.bench.provenance import peak_memory, provenance
from kvtrim.hf.generate import read
from kvtrim.methods import echo_tables

METHODS = {
    "full": {},
    "snapkv": {"chunks": True},
    "keydiff": {"chunks": True},
    "adakv": {"chunks": True},
    "streaming-llm": {"chunks": True},
    "echo": {"chunks": True, "asked": 0},
}
SIZES = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
}


def measure(method: str, length: int, chunk: int, keep: int) -> dict:
    """Read one prompt; figures of this process."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 1000, (1, length), generator=draw)
    settings = METHODS[method] | (random_table() if method == "echo" else {})
    cache = kvtrim.Cache(model, method, keep, prompt_tokens=length, **settings)
    with kvtrim.attach(model), peak_memory(model.device) as peak:
        start = time.perf_counter()
        read(model, ids, cache, chunk)
        seconds = time.perf_counter() - start
    row = {"method": method, "length": length, "peak_bytes": peak.bytes, "seconds": seconds}
    return row | {"held_bytes": cache.held_bytes, "full_bytes": cache.full_bytes}


def random_table() -> dict[str, str]:
    """A table of echo for a model of these sizes."""
    layers, heads, width = (
        SIZES[name] for name in ("num_hidden_layers", "num_key_value_heads", "hidden_size")
    )
    draw = torch.Generator().manual_seed(2)
    weight = torch.randn(layers, heads, width, generator=draw) / width**0.5
    path = Path(tempfile.mkdtemp()) / "random.safetensors"
    echo_tables.write(path, echo_tables.EchoTable(weight.half(), torch.zeros(layers, heads)), {})
    return {"table": str(path)}


def main() -> None:
    """Run and write the two files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--keep", type=int, default=1024)
    parser.add_argument("--method", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--out", type=Path, default=Path("experiments/chunked_memory"))
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "LENGTH"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        method, length = given.one
        print(json.dumps(measure(method, int(length), given.chunk, given.keep)))
        return
    rows = []
    for method in given.method:
        for length in given.lengths:
            command = [sys.executable, __file__, "--one", method, str(length)]
            command += ["--chunk", str(given.chunk), "--keep", str(given.keep)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    run = {"machine": provenance(torch.device("cpu")), "model": SIZES, "seed": 1}
    run |= {"chunk": given.chunk, "keep": given.keep, "rows": rows}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "chunked_memory.json").write_text(json.dumps(run, indent=1) + "\n")
    (given.out / "chunked_memory.md").write_text(table(rows, given.chunk, given.keep))


def table(rows: list[dict], chunk: int, keep: int) -> str:
    """The rows as Markdown, one line per method."""
    lengths = sorted({row["length"] for row in rows})
    first, last = lengths[0], lengths[-1]
    heads = [f"peak at {length:,}" for length in lengths]
    lines = [
        f"Peak memory above the loaded model, MiB, of reading a prompt in chunks of {chunk:,} "
        f"tokens; methods keep {keep:,} and are cut after every chunk.",
        "Random prompt, random weights: no question, so neither protocol applies. Held: bytes of "
        f"the store after {last:,} tokens.\n",
        f"| method | {' | '.join(heads)} | growth {first:,} to {last:,} | held |",
        "|---|" + "---:|" * (len(lengths) + 2),
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = {row["length"]: row for row in rows if row["method"] == method}
        peaks = [own[length]["peak_bytes"] / 2**20 for length in lengths]
        cells = " | ".join(f"{peak:.0f}" for peak in peaks)
        held = own[last]["held_bytes"] / 2**20
        lines.append(
            f"| {method} | {cells} | {100 * (peaks[-1] / peaks[0] - 1):+.0f}% | {held:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
