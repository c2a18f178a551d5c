"""Everything that needs a CUDA device, in order of value, within the minutes that are given.

    python experiments/gpu.py --minutes 8 --out DIR [--commit HASH] [--stage NAME ...]
    python experiments/gpu.py --dry-run --minutes 1

Each figure is a line of DIR/gpu.jsonl as soon as it is there, with machine, versions and commit; a
failure is a line too. None is begun that no longer fits. The same command on the same folder goes
on where it ended. In the end DIR/summary.md has the tables and what of the targets was reached.
Random weights, bf16, no network. --dry-run is the same code on a CPU: a model of two layers, short
prompts, Triton's interpreter. Nothing it prints is a figure of a GPU.

check     the kernels against float64, each number format
tokens    captured decoding gives the tokens of plain decoding
decode    a step over caches filled with random entries: plain transformers, kvtrim plain and
          captured, heads alike and from 0.2 to 1.8 of the mean, share of the copy bandwidth
serve     answers over four documents in common passes, as a server makes them, plain and captured
prefill   time to first token and peak memory, methods in turn, there and back
probe     h2o and kvzip, which read every query, beside a plain prefill
kernels   decode attention alone, by implementation and shape
batch     the largest batch, everything kept and 10 % kept
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

import gpu_work as work  # noqa: E402
from gpu_work import SUBJECTS, Bench, Scale  # noqa: E402

from kvtrim.bench.speed import agenda  # noqa: E402
from kvtrim.bench.speed.agenda import Agenda, Item  # noqa: E402

STAGES = ("check", "tokens", "decode", "serve", "prefill", "probe", "kernels", "batch")
SUMMARY_S = 5.0  # kept back for the last page
PREFILL = {  # method: its settings, and its share of the work of reading everything
    "transformers": ({}, 1.0),
    "full": ({}, 1.0),
    "fastkv": ({"preset": "v1"}, 0.55),  # as published: T = 2,048 tokens go on, not a rate
    "snapkv": ({}, 1.0),
    "gemfilter": ({}, 0.55),
    "adakv": ({}, 1.0),
    "laprox": ({}, 1.05),
    "headkv": ({"table": "random"}, 1.0),
}
LATE = ("adakv", "laprox", "headkv")  # their longest prompt
PROBE = {"transformers": 1.0, "full": 1.0, "h2o": 1.5, "kvzip": 3.0}


GPU = Scale(
    device="cuda", config="llama-3.1-8b", layers=None, width=None, dtype="bfloat16",
    formats=("bfloat16", "float16"), impl="auto",
    shapes=((128, 4, 1), (128, 4, 5), (64, 3, 1), (256, 2, 1)),
    runs=([[700, 7, 7, 1]], [[0, 1], [64, 65], [300, 2]], [[1000, 10, 500, 33]]),
    prompt=1500, keep=256, answers=40,
    held=((1, 1024), (32, 2048), (1, 2048), (1, 512), (1, 32_768), (1, 131_072), (32, 1024),
          (32, 512), (32, 32_768)),
    served=(1, 4, 16), documents=2048,
    steps=24, lengths=(32_768, 65_536, 131_072), budget="2048", warm=4096, probed=16_384,
    kernel_shapes=((1, 1024), (1, 16_384), (1, 131_072), (32, 2048)), filled=32_768, most=512,
    flop_per_s=3.5e14, bytes_per_s=2.5e12,
)  # fmt: skip
DRY = Scale(
    device="cpu", config="smollm2-135m", layers=2, width=1, dtype="float32",
    formats=("float32", "float16"), impl="triton",  # the interpreter does not know bf16
    shapes=((64, 3, 2),), runs=([[70, 7]],), prompt=48, keep=36, answers=8,
    held=((1, 24), (2, 24), (2, 10**9)), served=(5,), documents=24, steps=2,
    lengths=(64,), budget="40", warm=48, probed=64,
    kernel_shapes=((2, 24),), filled=48, most=2, flop_per_s=1e11,
    bytes_per_s=1e10,
)  # fmt: skip


# The list of them


def items(bench: Bench, folder: Path, until: float) -> Iterator[Item]:
    """Every measurement, the most valuable first."""
    s = bench.scale
    for name, (width, group, count) in product(s.formats, s.shapes):
        todo = partial(work.check_attention, bench, name, width, group, count)
        yield Item("check", f"{name} {width} wide, {group} x {count}", 3.0, todo)
    for name in s.formats:
        yield Item("check", f"{name} columns", 4.0, partial(work.check_columns, bench, name))
    for method, settings in (("full", {}), ("snapkv", {}), ("adakv", {}),
                             ("headkv", {"table": "random"})):  # fmt: skip
        yield Item("tokens", method, 3.0, partial(work.same_tokens, bench, method, settings))
    yield from decode_items(bench)
    for answers, captured in product(s.served, (False, True)):
        name = f"{answers} answers{' captured' if captured else ''}"
        todo = partial(work.serve, bench, answers, captured)
        yield Item("serve", name, 2.0 + s.steps * 0.1, todo)
    yield from prefill_items(bench, first=True)
    for number, method in rounds(PROBE):
        todo = partial(work.first_token, bench, method, {}, s.probed, "10%")
        estimate = PROBE[method] * reading_s(s, s.probed)
        yield Item("probe", f"{method} {s.probed} round {number}", estimate, todo)
    for (rows, held), per_head in product(s.kernel_shapes, (False, True)):
        for impl in ("triton", "varlen", "sdpa"):
            name = f"{impl} {rows} x {held}{' per-head' if per_head else ''}"
            skip = "FlashAttention needs CUDA" if impl == "varlen" and s.device == "cpu" else ""
            todo = partial(work.kernel, bench, rows, held, per_head, impl)
            yield Item("kernels", name, 1.0, todo, skip)
    for method, keep in (("snapkv", "10%"), ("adakv", "10%"), ("full", "")):
        todo = partial(work.largest, bench, folder, until, method, keep)
        yield Item("batch", f"{method} {keep}".strip(), 25 * reading_s(s, s.filled), todo)
    yield from prefill_items(bench, first=False)


def decode_items(bench: Bench) -> Iterator[Item]:
    """Steps by what is held; what cannot fit is said, not tried."""
    s = bench.scale
    entry, weights, memory = sizes(s)
    for (rows, held), subject in product(s.held, SUBJECTS):
        held_bytes, skip = rows * held * entry, ""
        if 1.15 * held_bytes + 1.3 * weights > memory and rows > 1:
            skip = f"{held_bytes / 1e9:.0f} GB of entries beside {weights / 1e9:.0f} GB of weights"
        moved = weights + held_bytes * (3 if subject == "transformers" else 1)
        estimate = 0.5 + (s.steps + 5) * (0.03 + moved / s.bytes_per_s)
        todo = partial(work.decode, bench, rows, held, subject)
        yield Item("decode", f"{subject} {rows} x {held}", estimate, todo, skip)


def prefill_items(bench: Bench, first: bool) -> Iterator[Item]:
    """Prompts by length, methods in turn.

    The longest takes most of the time: its second round, and the methods there that cost what the
    others cost, come at the very end.
    """
    s = bench.scale
    for length in s.lengths:
        for number, method in rounds(PREFILL):
            late = length == s.lengths[-1] and (number == 2 or method in LATE)
            if late != first:
                settings, share = PREFILL[method]
                todo = partial(work.first_token, bench, method, settings, length, s.budget)
                name = f"{method} {length} round {number}"
                yield Item("prefill", name, share * reading_s(s, length), todo)


def rounds(methods: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """Every method twice, there and back."""
    for number in (1, 2):
        for method in reversed(methods) if number == 2 else methods:
            yield number, method


def sizes(s: Scale) -> tuple[float, float, float]:
    """Bytes of an entry in all layers and heads, of the weights, and of the device's memory."""
    import torch

    from kvtrim.hf.models.random import published_config

    dims = published_config(s.config)
    layers, heads = s.layers or dims["num_hidden_layers"], s.width or dims["num_key_value_heads"]
    width = dims.get("head_dim") or dims["hidden_size"] // dims["num_attention_heads"]
    itemsize = 4 if s.dtype == "float32" else 2
    entry = 2 * layers * heads * width * itemsize
    hidden = dims["hidden_size"] * heads // dims["num_key_value_heads"]
    inner = dims["intermediate_size"] * heads // dims["num_key_value_heads"]
    each = hidden * (2 * hidden + 2 * heads * width + 3 * inner)
    weights = (layers * each + 2 * dims["vocab_size"] * hidden) * itemsize
    memory = 4e9
    if s.device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    return entry, weights, memory


def reading_s(s: Scale, length: int) -> float:
    """Seconds that a prompt of this length should take at the guessed rate."""
    from kvtrim.hf.models.random import published_config

    dims = published_config(s.config)
    _, weights, _ = sizes(s)
    layers, heads = s.layers or dims["num_hidden_layers"], dims["num_attention_heads"]
    pairs = length * length / 2 * 4 * layers * heads * 128
    return 0.3 + (weights * length + pairs) / s.flop_per_s


def measure(scale: Scale, folder: Path, until: float, stages: list[str], commit: str) -> int:
    """The measuring process."""
    import torch

    from kvtrim.bench.provenance import provenance

    begin, bench = time.time(), Bench(scale)
    if scale.device == "cuda":
        torch.cuda.init()
    about = provenance(bench.device)
    about["commit"] = commit or about["commit"]
    listed = [x for x in items(bench, folder, until) if x.stage in stages]
    freed = [replace(item, work=partial(clean, bench, item.work)) for item in listed]
    print(f"ready after {time.time() - begin:.1f} s; {len(listed)} measurements", flush=True)
    plan = Agenda(freed, folder, about)
    return plan.run(until, bench.broken, lambda: bench.setup_s, partial(print, flush=True))


def clean(bench: Bench, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A measurement that begins with the memory of those before it given back."""
    bench.free()
    return work()


def main(arguments: list[str] | None = None) -> int:
    """Watch the measuring process, and write the summary; or be that process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--stage", action="append", choices=STAGES)
    parser.add_argument("--commit", default="", help="where there is no git to ask")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    begin, scale = time.time(), DRY if given.dry_run else GPU
    out = given.out or ROOT / "experiments" / ("gpu-dry-run" if given.dry_run else "gpu")
    out.mkdir(parents=True, exist_ok=True)
    if given.until is not None:
        return measure(scale, out, given.until, given.stage or list(STAGES), given.commit)
    until = begin + 60 * given.minutes - SUMMARY_S
    command = [sys.executable, str(Path(__file__)), "--until", str(until), "--out", str(out)]
    command += ["--commit", given.commit] + ["--dry-run"] * given.dry_run
    command += [word for stage in given.stage or [] for word in ("--stage", stage)]
    interpreted = {"TRITON_INTERPRET": "1"} if given.dry_run else {}
    agenda.watch(command, out, until, {"PYTHONUNBUFFERED": "1"} | interpreted)
    return concluded(out)


def concluded(out: Path) -> int:
    """Write the summary; 1 if something failed."""
    from kvtrim import files
    from kvtrim.records.journal import Journal
    from kvtrim.report import gpu

    lines = Journal(out / agenda.LINES).lines
    files.replace(out / "summary.md", gpu.page(lines).encode())
    failed = [f"{x['stage']}: {x['name']}: {x['reason']}" for x in gpu.failures(lines)]
    print(f"{out / 'summary.md'}: {len(gpu.figures(lines))} figures, {len(failed)} failures")
    print("\n".join(failed))
    return 1 if failed or not gpu.figures(lines) else 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
