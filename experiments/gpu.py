"""Everything that needs a CUDA device, in stages; each writes its own folder and can be repeated.

    python experiments/gpu.py [--stage NAME ...] [--out experiments/gpu] [--small]

check     the Triton kernels and torch's varlen attention against float64 loops
kernels   decode attention alone: implementations, ragged against uniform, share of bandwidth
prefill   kvtrim speed, 8k to 128k tokens, Llama-3.1-8B and Mistral-Nemo-12B shapes
decode    kvtrim speed, 128k tokens compressed to 512, 1024, 2048: share of the roofline, captured
          and plain, beside plain transformers and, where it is installed, kvpress
batch     the largest batch at 32k tokens, everything kept and 10 % kept

Random weights, bf16. --small runs the same on two layers and short prompts, to see that it works.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import median

import torch

import kvtrim
from kvtrim.bench.provenance import provenance
from kvtrim.bench.speed.roofline import of_machine
from kvtrim.cache.store import starts_of
from kvtrim.hf.generate import generate
from kvtrim.hf.models.random import build
from kvtrim.kernels import columns, reference, sdpa, split, varlen

CUDA = torch.device("cuda")
LLAMA, NEMO = "llama-3.1-8b", "mistral-nemo-12b"
PREFILL = ["full", "snapkv", "adakv", "gemfilter", "fastkv"]
CLOSE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def runs(lengths: list[list[int]], width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Flat keys and values on the device, starts and lengths on the CPU."""
    length = torch.tensor(lengths)
    keys, values = torch.randn(2, int(length.sum()), width, device=CUDA).to(dtype)
    return keys, values, starts_of(length), length


def check(out: Path, small: bool) -> None:
    """Random ragged shapes against the reference; the worst difference of each kind."""
    shapes = [[[700, 7, 7, 1]], [[0, 1], [64, 65], [300, 2]], [[1000, 10, 500, 33]]]
    worst: dict[str, float] = {}
    widths = (128,) if small else (64, 96, 128, 256)
    for dtype, width, group, count in product(CLOSE, widths, (1, 3, 4, 8), (1, 5, 16)):
        for lengths in shapes:
            keys, values, start, length = runs(lengths, width, dtype)
            heads = group * length.shape[1]
            queries = torch.randn(len(length), heads, count, width, device=CUDA).to(dtype)
            exact = [x.double().cpu() for x in (queries, keys, values)]
            want = reference.ragged(*exact, start, length, width**-0.5)
            got = {"triton": split.ragged(queries, keys, values, start, length, width**-0.5).out}
            if dtype != torch.float32:
                given = queries, keys, values, start, length, width**-0.5
                got["varlen"] = varlen.ragged(*given)
            for name, found in got.items():
                apart = float((found.double().cpu() - want).abs().max())  # NaN fails as well
                key = f"{name} {str(dtype).removeprefix('torch.')}"
                worst[key] = max(worst.get(key, 0.0), apart)
                if not apart <= CLOSE[dtype]:
                    raise SystemExit(f"{key}, width {width}, group {group}: off by {apart}")
    write(out, "check", {"worst absolute difference": worst, **sums(), **answers()})


def sums() -> dict[str, object]:
    """Column sums on the device against those of the whole matrix in torch."""
    queries = torch.randn(2, 8, 300, 128, device=CUDA)
    keys = torch.randn(2, 700, 2, 128, device=CUDA).transpose(1, 2)
    logits = queries.double().unflatten(1, (2, 4)) @ keys.double()[:, :, None].mT * 0.1
    seen = torch.arange(700, device=CUDA) <= torch.arange(400, 700, device=CUDA)[:, None]
    want = logits.masked_fill(~seen, -torch.inf).softmax(-1).sum(-2).flatten(1, 2)
    apart = float((columns.sums(queries, keys, 0.1) - want).abs().max())
    if not apart <= 1e-3:
        raise SystemExit(f"column sums are off by {apart}")
    return {"column sums": apart}


def answers() -> dict[str, object]:
    """Captured answers of a small model in fp32 are those of the plain loop, and were captured."""
    model = build("smollm2-135m", layers=4, device="cuda", dtype="float32")
    ids = torch.randint(5, 40000, (1, 1500), device=CUDA)
    for method in ("full", "snapkv", "adakv"):
        found = []
        for impl in ("auto", "sdpa"):
            cache = kvtrim.Cache(model, method, 256, impl=impl)
            with kvtrim.attach(model):
                found.append(generate(model, ids, cache, 40))
        captured, plain = found
        if captured.token_ids != plain.token_ids or captured.decoding != "captured":
            raise SystemExit(
                f"{method}: {captured.decoding}: {captured.token_ids} {plain.token_ids}"
            )
    return {"captured answers": "those of the plain loop"}


def kernels(out: Path, small: bool) -> None:
    """Microseconds per call of one layer (8 KV heads, 32 query heads of 128, bf16).

    Triton is given its plan, as captured steps have it; the others prepare theirs in every call,
    as they do in use. What fits into the L2 cache may come faster than memory allows.
    """
    rate, rows = of_machine(CUDA, torch.bfloat16)["copy_bytes_per_s"], []
    for batch, held in product((1, 16), (512, 2048, 16384) if not small else (512,)):
        uneven = torch.linspace(0.2, 1.8, 8).mul(held).long()
        uneven[-1] += 8 * held - uneven.sum()
        shapes = {"uniform": [[held] * 8] * batch, "ragged": [uneven.tolist()] * batch}
        for shape, lengths in shapes.items():
            keys, values, start, length = runs(lengths, 128, torch.bfloat16)
            queries = torch.randn(batch, 32, 1, 128, device=CUDA).bfloat16()
            plan, place = split.Tiles.of(length, CUDA), (start.to(CUDA), length.to(CUDA))
            given = queries, keys, values
            calls: dict[str, Callable[[], object]] = {
                "triton": partial(split.ragged, *given, *place, 0.1, None, plan),
                "varlen": partial(varlen.ragged, *given, start, length, 0.1),
                "sdpa": partial(sdpa.ragged, *given, start, length, 0.1),
            }
            floor = (keys.nbytes + values.nbytes) / rate  # every slot is read once
            for name, call in calls.items():
                took = timed(call)
                row = {"batch": batch, "held": held, "shape": shape, "impl": name}
                rows.append(row | {"us": 1e6 * took, "of_bandwidth": floor / took})
    write(out, "kernels", {"copy_bytes_per_s": rate, "rows": rows})


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call on the device: median over batches of twenty, after a warm-up."""
    found = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(20):
            call()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / 20e3)
    return median(found[2:])


def speed(out: Path, name: str, small: bool, *options: str) -> None:
    """One run of `kvtrim speed`, which goes on where it was cut off."""
    cut = ["--layers", "2"] if small else []
    command = [sys.executable, "-m", "kvtrim", "speed", "--device", "cuda", "--dtype", "bfloat16"]
    subprocess.run([*command, *options, *cut, "--out", str(out / name)], check=True)


def many(option: str, values: list[str]) -> list[str]:
    """An option, once for each value."""
    return [word for value in values for word in (option, value)]


def prefill(out: Path, small: bool) -> None:
    """Time to first token by length."""
    lengths = ["2048"] if small else ["8192", "16384", "32768", "65536", "131072"]
    asked = many("--length", lengths) + many("--method", PREFILL)
    asked += many("--keep", ["512", "1024", "2048"])
    for config in (LLAMA, NEMO):
        speed(out, f"prefill-{config}", small, "--config", config, *asked, "--new-tokens", "32")


def decode(out: Path, small: bool) -> None:
    """Tokens per second after a long prompt."""
    length = "4096" if small else "131072"
    asked = ["--config", LLAMA, "--length", length, "--new-tokens", "128", "--repeats", "3"]
    asked += many("--method", ["full", "snapkv", "adakv"]) + many(
        "--keep", ["512", "1024", "2048"]
    )
    peers = ["--peer", "kvpress"] if find_spec("kvpress") else []
    speed(out, "decode", small, *asked, *peers)
    speed(out, "decode-plain", small, *asked, "--no-capture")


def batch(out: Path, small: bool) -> None:
    """The largest batch, and its tokens per second."""
    memory = int(torch.cuda.get_device_properties(CUDA).total_memory * 0.9)
    asked = ["--config", LLAMA, "--length", "1024" if small else "32768", "--keep", "10%"]
    asked += many("--method", ["full", "snapkv", "adakv"])
    filled = ["--batch", "max", "--memory", f"{memory >> 20}MiB"]
    speed(out, "batch", small, *asked, *filled, "--new-tokens", "32")


def write(out: Path, name: str, found: dict[str, object]) -> None:
    """One stage's figures, with where they come from."""
    record = {"machine": provenance(CUDA)} | found
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(found, indent=1))


STAGES = {s.__name__: s for s in (check, kernels, prefill, decode, batch)}


def main() -> None:
    """Run the stages that were asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", action="append", choices=STAGES)
    parser.add_argument("--out", type=Path, default=Path("experiments/gpu"))
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; these measurements need one")
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.stage or STAGES:
        print(f"== {name}", flush=True)
        STAGES[name](given.out, given.small)


if __name__ == "__main__":
    main()
