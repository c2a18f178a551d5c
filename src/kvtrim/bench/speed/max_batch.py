"""The largest batch that fits into a given memory, and its tokens per second.

Prompts are read one after the other, as a server would; their caches then decode together. So what
has to fit is the weights and the larger of two things: all caches while they decode, and the last
prompt being read beside the caches of the others. One prompt is read and its cache repeated, which
costs the bytes of as many prompts of that length. Batches double until one does not fit; then the
gap is halved. Every try goes to the journal at once.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch

from kvtrim.bench.candidates import Candidate
from kvtrim.bench.provenance import peak_memory
from kvtrim.bench.speed.clock import prompt, require_window
from kvtrim.errors import KvtrimError, UsageError
from kvtrim.hf.generate import synchronize
from kvtrim.records import BatchLine, Fitted
from kvtrim.records.journal import Journal, Key

_MEMORY_STEPS = 2  # tokens while memory is measured, which slows steps down


@dataclass(frozen=True)
class Search:
    """What is searched for, apart from the methods."""

    lengths: tuple[int, ...]  # tokens of the (random) prompts
    memory: int  # bytes for weights, caches and whatever else is in use at once
    new_tokens: int = 32  # timed decoding steps of every batch
    most: int = 4096  # prompts at once, at most
    capture: bool = True

    def require_fits(self, model: Any, trained: bool = True) -> None:
        """Refuse prompts that the model has no positions for. Raises UsageError."""
        require_window(model, self.lengths, self.new_tokens + _MEMORY_STEPS, trained)


def search(
    model: Any,
    plan: Search,
    chosen: Sequence[Candidate],
    journal: Journal,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Try batches for every length and candidate until the largest is known."""
    for length in plan.lengths:
        for candidate in chosen:
            key = {"length": length, "method": candidate.label, "keep": candidate.keep}
            while (batch := next_batch(_tries(journal, key), plan.most)) is not None:
                progress(f"{candidate.said}, {length} tokens x {batch}")
                found = _attempt(model, plan, candidate, length, batch)
                line: BatchLine = {
                    "length": length, "method": candidate.label, "keep": candidate.keep,
                    "batch": batch, **found,
                }  # fmt: skip
                journal.add(line)


def next_batch(tried: dict[int, bool], most: int) -> int | None:
    """The next batch to try, by which of those tried fit; None if the largest is known."""
    best = max((batch for batch, fits in tried.items() if fits), default=0)
    worst = min((batch for batch, fits in tried.items() if not fits), default=most + 1)
    if worst - best <= 1:
        return None
    return min(2 * best or 1, most) if worst > most else (best + worst) // 2


def _tries(journal: Journal, key: Key) -> dict[int, bool]:
    return {line["batch"]: line["fits"] for line in journal.lines if key.items() <= line.items()}


def _attempt(model: Any, plan: Search, candidate: Candidate, length: int, batch: int) -> Fitted:
    """Whether a batch fits, and what it gave; a candidate that fails fits nothing."""
    try:
        return _measure(model, plan, candidate, length, batch)
    except (torch.OutOfMemoryError, MemoryError):
        reason = "out of memory"
    except UsageError:
        raise
    except KvtrimError as error:
        reason = " ".join(str(error).split())
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        reason = "out of memory"
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    return {"fits": False, "reason": reason}


def _measure(model: Any, plan: Search, candidate: Candidate, length: int, batch: int) -> Fitted:
    weights = sum(parameter.nbytes for parameter in model.parameters())
    ids, steps = prompt(model, 1, length), []
    opened = candidate.open(model, length, None, plan.capture)
    with opened as subject, torch.no_grad():
        with peak_memory(model.device) as reading:
            token = subject.feed(ids)[:, -1].argmax(dim=-1, keepdim=True)
        alone = subject.figures()["held_bytes"]
        with peak_memory(model.device, reading.base) as decoding:
            subject.cache.batch_repeat_interleave(batch)
            token = token.expand(batch, 1).contiguous()
            with subject.steps(_MEMORY_STEPS) as (feed, _):
                for _ in range(_MEMORY_STEPS):
                    token = feed(token)[:, -1].argmax(dim=-1, keepdim=True)
        used = _peak_bytes(weights, alone, batch, reading.bytes, decoding.bytes)
        if used > plan.memory:
            held = subject.figures()["held_bytes"]
            return {
                "fits": False, "used_bytes": used, "held_bytes": held,
                "token_s": 0.0, "tokens_per_s": 0.0, "captured": False,
            }  # fmt: skip
        with subject.steps(plan.new_tokens) as (feed, captured):
            for _ in range(plan.new_tokens):
                synchronize(model.device)
                start = perf_counter()
                token = feed(token)[:, -1].argmax(dim=-1, keepdim=True)
                synchronize(model.device)
                steps.append(perf_counter() - start)
        held, each = subject.figures()["held_bytes"], median(steps)
        return {
            "fits": True, "used_bytes": used, "held_bytes": held,
            "token_s": each, "tokens_per_s": batch / each, "captured": captured,
        }  # fmt: skip


def _peak_bytes(
    weights: int, alone: int, batch: int, reading: int | None, decoding: int | None
) -> int:
    """Bytes in use at the worst moment.

    Raises:
        UsageError: this machine cannot tell how much memory was in use.
    """
    if reading is None or decoding is None:
        raise UsageError(
            "memory peaks can be told on CUDA and on Linux only; measure batches one by one there "
            "(--batch 4 --batch 8)"
        )
    return weights + max(decoding, (batch - 1) * alone + reading)
