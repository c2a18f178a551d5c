"""What the plan for a GPU measures (see gpu.py): one function for each kind of figure.

Importing it loads no torch, so that whoever only watches starts at once.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from kvtrim.bench.speed import agenda

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    device: str
    config: str
    layers: int | None
    width: int | None
    dtype: str
    formats: tuple[str, ...]  # that the kernels are checked in
    impl: str  # decode attention whose steps can be captured
    shapes: tuple[tuple[int, int, int], ...]  # head width, query heads per KV head, new tokens
    runs: tuple[list[list[int]], ...]  # entries per prompt and head
    prompt: int  # tokens, and the budget, where answers are compared
    keep: int
    answers: int  # new tokens there
    held: tuple[tuple[int, int], ...]  # prompts, entries per head
    served: tuple[int, ...]  # answers that decode together over four documents
    documents: int  # entries per head of such a document
    steps: int
    lengths: tuple[int, ...]  # of prompts whose reading is timed
    budget: str
    warm: int  # tokens of the prompt that warms a method up
    probed: int
    kernel_shapes: tuple[tuple[int, int], ...]
    filled: int  # tokens of prompts that are to decode together
    most: int
    flop_per_s: float  # guesses, which only the estimates need
    bytes_per_s: float


# What measuring needs, made when it is first asked for


class Bench:
    """The device and the models on it."""

    def __init__(self, scale: Scale):
        import torch

        self.scale, self.setup_s = scale, 0.0
        self.warm: set[str] = set()  # methods that have read a prompt
        self.device = torch.device(scale.device)
        self.dtype = getattr(torch, scale.dtype)

    @cached_property
    def model(self) -> Any:
        """The large model, after a short prompt and a step."""
        s = self.scale
        return self._made(s.config, s.layers, s.width, s.dtype)

    @cached_property
    def small(self) -> Any:
        """A small one in fp32, whose answers are compared."""
        if self.scale.device == "cpu":
            return self.model
        return self._made("smollm2-135m", 4, None, "float32")

    @cached_property
    def limits(self) -> dict[str, float]:
        """Bytes that a copy moves per second, and what the model asks for."""
        from kvtrim.bench.speed.roofline import of_machine, of_model

        model, begin = self.model, time.time()
        found = of_machine(self.device, self.dtype) | of_model(model)
        self.setup_s += time.time() - begin
        return found

    def free(self) -> None:
        """Give back what a measurement, or its error, left behind."""
        import torch

        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def broken(self) -> bool:
        """Whether the device answers no more: an illegal access spoils the whole process."""
        try:
            self.free()
            self.wait()
        except RuntimeError:
            return True
        return False

    def wait(self) -> None:
        """Until the device has done everything."""
        from kvtrim.hf.generate import synchronize

        synchronize(self.device)

    def _made(self, config: str, layers: int | None, width: int | None, dtype: str) -> Any:
        import torch

        from kvtrim.bench.candidates import make_feed
        from kvtrim.bench.speed.clock import prompt, step
        from kvtrim.hf.generate import plain_cache
        from kvtrim.hf.models.random import build

        begin = time.time()
        model = build(config, layers=layers, width=width, device=self.device, dtype=dtype)
        feed = make_feed(model, plain_cache(model))
        with torch.no_grad():
            token, _ = step(model, feed, prompt(model, 1, min(512, self.scale.prompt)))
            step(model, feed, token)
        self.wait()
        gc.collect()
        gc.freeze()  # or every measurement's collection goes through what imports left: 0.4 s
        self.setup_s += time.time() - begin
        return model


def timed(bench: Bench, calls: list[Callable[[], object]], capture: bool = False) -> float:
    """Seconds of one call on the device; the calls are taken in turn, so none finds its inputs.

    The median over batches of them, after two that are not counted. Captured calls are replayed,
    so that the host, which takes longer to launch them, does not count.
    """
    import torch

    found, cuda, turn = [], bench.device.type == "cuda", cycle(calls)
    count, batches = (32, 10) if cuda else (1, 3)
    if capture and cuda:
        turn, count, whole = cycle([captured(calls, count)]), 1, count
    else:
        whole = count
    for _ in range(batches):
        bench.wait()
        begin = time.perf_counter()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if cuda else []
        for mark in marks[:1]:
            mark.record()
        for _ in range(count):
            next(turn)()
        for mark in marks[1:]:
            mark.record()
        bench.wait()
        took = marks[0].elapsed_time(marks[1]) / 1e3 if cuda else time.perf_counter() - begin
        found.append(took / whole)
    return median(found[2:])


def captured(calls: list[Callable[[], object]], count: int) -> Callable[[], object]:
    """So many calls in turn as one CUDA graph, after each was made once."""
    import torch

    for call in calls:
        call()
    torch.cuda.synchronize()
    graph, turn = torch.cuda.CUDAGraph(), cycle(calls)
    with torch.cuda.graph(graph):
        for _ in range(count):
            next(turn)()
    return graph.replay


# The measurements


def runs(
    bench: Bench, lengths: list[list[int]], width: int, dtype: "torch.dtype"
) -> "tuple[torch.Tensor, ...]":
    """Flat keys and values on the device, starts and lengths on the CPU."""
    import torch

    from kvtrim.cache.store import starts_of

    length = torch.tensor(lengths)
    keys, values = torch.randn(2, int(length.sum()), width, device=bench.device).to(dtype)
    return keys, values, starts_of(length), length


def apart(found: "torch.Tensor", want: "torch.Tensor") -> float:
    """Distance from what is right, relative to its size; what is no number is infinitely far."""
    far = float((found.double().cpu() - want).norm() / want.norm().clamp(min=1e-300))
    return far if far == far else float("inf")


CLOSE = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 2e-2}


def check_attention(bench: Bench, name: str, width: int, group: int, count: int) -> dict[str, Any]:
    """Ragged decode attention, and appending, against float64 loops."""
    import torch

    from kvtrim.errors import UsageError
    from kvtrim.kernels import append, reference, split, varlen

    dtype, worst = getattr(torch, name), {}
    for lengths in bench.scale.runs:
        keys, values, start, length = runs(bench, lengths, width, dtype)
        heads = group * length.shape[1]
        queries = torch.randn(len(length), heads, count, width, device=bench.device).to(dtype)
        exact = [x.double().cpu() for x in (queries, keys, values)]
        want = reference.ragged(*exact, start, length, width**-0.5)
        given = queries, keys, values, start, length, width**-0.5
        results = {"triton": split.ragged(*given).out}
        try:
            results["varlen"] = varlen.ragged(*given)
        except UsageError:
            if bench.device.type == "cuda":
                raise
        for impl, found in results.items():
            worst[impl] = max(worst.get(impl, 0.0), apart(found, want))
    # the last of the shapes has no empty run, into which nothing could be appended
    buffers = {"keys": keys.clone(), "values": values.clone()}
    buffers["positions"] = torch.zeros(len(keys), dtype=torch.int32, device=bench.device)
    rows, kv_heads = length.shape
    new = torch.randn(2, rows, kv_heads, 1, width, device=bench.device).to(dtype)
    at = torch.full((rows, 1), 7, device=bench.device)
    places = start.to(bench.device), length.to(bench.device)
    append.append(buffers, *places, *new, at)
    ends = (start + length - 1).flatten().to(bench.device)
    if not torch.equal(buffers["keys"][ends], new[0].flatten(0, 2)):
        raise RuntimeError("what was appended is not there")
    return required(worst, CLOSE[name])


def check_columns(bench: Bench, name: str) -> dict[str, Any]:
    """Attention by slot, its sum and its largest, against the whole matrix in float64."""
    import torch

    from kvtrim.kernels import columns, sdpa

    draw = partial(torch.randn, device=bench.device)
    dtype, count = getattr(torch, name), 3 * bench.scale.prompt // 4
    slots = bench.scale.prompt
    queries, keys = draw(1, 4, count, 64).to(dtype), draw(1, 2, slots, 64).to(dtype)
    exact = keys.double().cpu().repeat_interleave(2, dim=1)
    logits = queries.double().cpu() @ exact.transpose(-1, -2) * 0.1
    seen = torch.ones(count, slots, dtype=torch.bool).tril(slots - count)
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    dense = sdpa.dense(queries, keys, keys, 0.1)
    found = {
        "sums": apart(columns.sums(queries, keys, 0.1), weights.sum(-2)),
        "largest": apart(columns.largest(queries, keys, 0.1), weights.amax(-2)),
        "sdpa behind a cache": apart(dense, weights @ exact),
    }
    return required(found, CLOSE[name])


def required(found: dict[str, float], most: float) -> dict[str, Any]:
    """The distances, if none of them is too far."""
    if max(found.values()) > most:
        raise RuntimeError(f"more than {most} away from float64: {found}")
    return {"apart": found, "most": most}


def same_tokens(bench: Bench, method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Captured answers are those of the plain loop, and were captured."""
    import torch

    import kvtrim
    from kvtrim.bench.speed.clock import prompt
    from kvtrim.hf.generate import generate

    model, found = bench.small, []
    ids = prompt(model, 1, bench.scale.prompt)
    for impl in (bench.scale.impl, "sdpa"):
        cache = kvtrim.Cache(model, method, bench.scale.keep, impl=impl, **settings)
        with kvtrim.attach(model), torch.no_grad():
            found.append(generate(model, ids, cache, bench.scale.answers))
    captured, plain = found
    if captured.token_ids != plain.token_ids:
        raise RuntimeError(f"{captured.token_ids} captured, {plain.token_ids} plain")
    if captured.decoding != "captured" and bench.device.type == "cuda":
        raise RuntimeError(captured.decoding)
    return {"tokens": len(plain.token_ids), "decoding": captured.decoding}


SUBJECTS = ("captured", "captured per-head", "transformers", "plain", "plain per-head")


def decode(bench: Bench, rows: int, held: int, name: str) -> dict[str, Any]:
    """Steps over a cache filled with random entries."""
    import torch

    from kvtrim.bench.speed import random_entries
    from kvtrim.bench.speed.clock import time_steps

    model, limits, s = bench.model, bench.limits, bench.scale
    if name == "transformers":
        opened = random_entries.theirs(model, rows, held)
    else:
        impl = s.impl if name.startswith("captured") else "auto"
        per_head, capture = name.endswith("per-head"), name.startswith("captured")
        opened = random_entries.ours(model, rows, held, per_head, capture, impl)
    with opened as subject, torch.no_grad():
        token = torch.full((rows, 1), 9, device=bench.device)
        held_bytes = subject.figures()["held_bytes"]
        if not name.startswith("captured"):  # capturing warms up by itself
            time_steps(model, subject, token, 2)
        found = time_steps(model, subject, token, s.steps)
    if capture_missing(name, found["captured"], bench):
        raise RuntimeError("the steps could not be captured")
    floor = (limits["weight_bytes"] + held_bytes) / limits["copy_bytes_per_s"]
    own = {"rows": rows, "held": held, "subject": name, "held_bytes": held_bytes}
    own |= {"floor_s": floor, "of_bandwidth": floor / found["median_step_s"]}
    return own | found | {"copy_bytes_per_s": limits["copy_bytes_per_s"]}


def serve(bench: Bench, answers: int, captured: bool) -> dict[str, Any]:
    """Steps of answers over four documents, heads of unequal length, as a server feeds them."""
    import torch

    from kvtrim.bench.speed import random_entries
    from kvtrim.engine.branch import Branch
    from kvtrim.hf.attach import attach
    from kvtrim.hf.decode import LEAST
    from kvtrim.hf.pack import Feed, Pack, base_of

    model, s, bases = bench.model, bench.scale, []
    for _ in range(4):
        with random_entries.ours(model, 1, s.documents, per_head=True, capture=False) as subject:
            bases.append(base_of(subject.cache))
    draw = torch.Generator().manual_seed(answers)
    lines = torch.randint(4, 250, (answers, s.steps + LEAST + 12), generator=draw).tolist()
    pack, found, taken = Pack(model, seats=captured), [], []
    with attach(model):
        branches = [Branch(bases[n % 4], room=len(line)) for n, line in enumerate(lines)]
        pack.feed(model, [Feed(b, line[:8]) for b, line in zip(branches, lines, strict=True)])
        for step in range(8, 12 + s.steps):
            feeds = [Feed(b, [line[step]]) for b, line in zip(branches, lines, strict=True)]
            bench.wait()
            begin = time.perf_counter()
            taken.append(pack.feed(model, feeds).argmax(-1).tolist())
            bench.wait()
            found.append(time.perf_counter() - begin)
        plain = Pack(model, seats=False)  # what each answer, asked for alone, has in the end
        apart = [
            Branch(each.base, room=len(line)) for each, line in zip(branches, lines, strict=True)
        ]
        feeds = [Feed(b, line[: 12 + s.steps]) for b, line in zip(apart, lines, strict=True)]
        alone = [plain.feed(model, [each]).argmax(-1).item() for each in feeds]
    if captured and not pack.has_seats:
        raise RuntimeError("no step was captured")
    own = {"answers": answers, "captured": captured, "held": s.documents}
    own |= {"median_step_s": median(found[4:]), "first_s": max(found[:4])}
    return own | {
        "same": sum(map(int.__eq__, taken[-1], alone)),
        "held_bytes": sum(b.held_bytes for b in bases),
    }


def capture_missing(name: str, captured: bool, bench: Bench) -> bool:
    """Whether steps that were to be captured were not, where they can be."""
    return name.startswith("captured") and not captured and bench.device.type == "cuda"


def first_token(
    bench: Bench, method: str, settings: dict[str, Any], length: int, keep: str
) -> dict[str, Any]:
    """Seconds and peak memory of one prompt, behind a short one that warms the method up."""
    import torch

    from kvtrim.bench.candidates import Candidate
    from kvtrim.bench.provenance import peak_memory
    from kvtrim.bench.speed.clock import prompt, step

    model, candidate = bench.model, Candidate(method, keep, settings)
    if method not in bench.warm:
        with candidate.open(model, bench.scale.warm, None) as subject, torch.no_grad():
            step(model, subject.feed, prompt(model, 1, bench.scale.warm))
        bench.warm.add(method)
    ids = prompt(model, 1, length)
    with candidate.open(model, length, None) as subject, torch.no_grad():
        with peak_memory(bench.device) as reading:
            _, seconds = step(model, subject.feed, ids)
        own = {"method": method, "length": length, "ttft_s": seconds, "keep": keep}
        return own | {"peak_bytes": reading.bytes} | subject.figures()


def kernel(bench: Bench, rows: int, held: int, per_head: bool, impl: str) -> dict[str, Any]:
    """Microseconds of one layer's decode attention.

    Triton is given its plan and replayed, as in captured steps; the others cannot be captured, and
    prepare theirs in every call as they do in use. Several sets of inputs take turns, so that none
    is found in the L2 cache.
    """
    import torch

    from kvtrim.bench.speed import random_entries
    from kvtrim.kernels import sdpa, split, varlen

    model = bench.model.config
    width = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    length = torch.full((rows, kv_heads), held)
    if per_head:
        length = random_entries.spread(held, rows, kv_heads, 0)
    size = 2 * int(length.sum()) * width * bench.dtype.itemsize
    calls: list[Callable[[], object]] = []
    for _ in range(max(1, min(32, (2**28 if bench.device.type == "cuda" else 1) // size))):
        keys, values, start, _ = runs(bench, length.tolist(), width, bench.dtype)
        queries = torch.randn(rows, heads, 1, width, device=bench.device).to(bench.dtype)
        given = queries, keys, values
        if impl == "triton":
            place = start.to(bench.device), length.to(bench.device)
            tiles = split.Tiles.of(length, bench.device)
            calls.append(partial(split.ragged, *given, *place, 0.1, None, tiles))
        else:
            call = varlen.ragged if impl == "varlen" else sdpa.ragged
            calls.append(partial(call, *given, start, length, 0.1))
    took = timed(bench, calls, capture=impl == "triton")
    own = {"rows": rows, "held": held, "per_head": per_head, "impl": impl, "us": 1e6 * took}
    return own | {"of_bandwidth": size / bench.limits["copy_bytes_per_s"] / took}


def largest(bench: Bench, folder: Path, until: float, method: str, keep: str) -> dict[str, Any]:
    """The largest batch that decodes; every try is a line of its own file."""
    import torch

    from kvtrim.bench.candidates import Candidate
    from kvtrim.bench.speed.max_batch import Search, search
    from kvtrim.records.journal import Journal

    weights = sum(each.nbytes for each in bench.model.parameters())
    memory = weights + 2**30
    if bench.device.type == "cuda":
        memory = int(torch.cuda.get_device_properties(bench.device).total_memory * 0.9)
    plan = Search((bench.scale.filled,), memory, bench.scale.steps, bench.scale.most)
    candidate, journal = Candidate(method, keep), Journal(folder / f"batch-{memory}.jsonl")

    def still(_: str) -> None:
        if time.time() + 5 > until:
            raise agenda.Unfinished("no time was left for another batch; a further run goes on")

    search(bench.model, plan, [candidate], journal, still)
    key = {"method": method, "keep": keep}
    fitting = [x for x in journal.lines if key.items() <= x.items() and x["fits"]]
    best = max(fitting, key=lambda line: line["batch"])
    return {"memory": memory, "tokens": bench.scale.filled, "tries": len(fitting)} | best
