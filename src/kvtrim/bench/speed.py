"""Seconds and bytes of prefill and decoding, each method beside plain transformers in one run.

Warm-up apart, prefill and decode apart. Every round runs all candidates, there and back, so that a
drifting machine slows them alike; medians are reported, and ratios are medians of the rounds' own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

import torch

from kvtrim.bench.machine import peak_memory
from kvtrim.budgets import Keep
from kvtrim.errors import UsageError
from kvtrim.hf.attach import attach
from kvtrim.hf.cache import Cache
from kvtrim.hf.running import plain_cache, stored_bytes, synchronize
from kvtrim.settings import find
from kvtrim.types import Int, Tensor

PLAIN = "transformers"
"""Name of the reference: sdpa attention and DynamicCache, kvtrim not attached."""


@dataclass(frozen=True)
class Candidate:
    """What is measured: a method with a budget, or plain transformers."""

    method: str
    keep: str = ""
    settings: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass
class Timing:
    """One candidate at one prompt length."""

    method: str
    keep: str
    length: int
    ttft_s: list[float] = field(default_factory=list)  # one per repeat
    token_s: list[float] = field(default_factory=list)  # median over the steps of each repeat
    peak_bytes: int | None = None  # of the prefill, above what was in use before
    held_bytes: int = 0  # after the prompt
    full_bytes: int = 0
    ttft_ratio: float | None = None  # to plain transformers at the same length
    token_ratio: float | None = None

    def record(self) -> dict[str, Any]:
        """Medians with their range, ready for JSON."""
        own = asdict(self) | {"ttft_s": median(self.ttft_s), "ttft_range_s": _range(self.ttft_s)}
        own["ms_per_token"] = 1e3 * median(self.token_s)
        own["ms_per_token_range"] = [1e3 * t for t in _range(self.token_s)]
        own["tokens_per_s"] = 1 / median(self.token_s)
        del own["token_s"]
        return own


def candidates(
    methods: Sequence[str], keeps: Sequence[str], settings: dict[str, Any] | None = None
) -> list[Candidate]:
    """Plain transformers, then every method with every budget; `full` needs none.

    Raises:
        UsageError: an unknown method or a budget that cannot be met, before anything is measured.
    """
    chosen = [Candidate(PLAIN)]
    for name in methods:
        method = find(name)
        for keep in keeps if not method.full else keeps[:1]:
            Keep.parse(keep)
            budget = "" if method.full else keep
            chosen.append(Candidate(name, budget, settings or {}))
    return chosen


def measure(
    model: Any,
    lengths: Sequence[int],
    chosen: Sequence[Candidate],
    new_tokens: int = 32,
    repeats: int = 3,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Timing]:
    """Measure every candidate at every prompt length.

    Args:
        lengths: tokens of the (random) prompts.
        new_tokens: decoding steps after each prompt.
        repeats: counted rounds; one more, on a short prompt, warms up.
        progress: told what comes next.

    Raises:
        UsageError: a prompt longer than the model's window.
    """
    window = model.config.get_text_config(decoder=True).max_position_embeddings
    if max(lengths) + new_tokens > window:
        raise UsageError(
            f"prompts of {max(lengths)} + {new_tokens} tokens exceed the window, {window}"
        )
    progress("warming up")
    for candidate in chosen:
        _run(model, candidate, _prompt(model, min(512, *lengths)), 2, Timing("", "", 0))
    rows = {length: [Timing(c.method, c.keep, length) for c in chosen] for length in lengths}
    for repeat in range(repeats):
        for length, row in rows.items():
            ids = _prompt(model, length)
            pairs = list(zip(chosen, row, strict=True))
            for candidate, timing in reversed(pairs) if repeat % 2 else pairs:
                name = f"{candidate.method} {candidate.keep}".strip()
                progress(f"{name}, {length} tokens, round {repeat + 1} of {repeats}")
                _run(model, candidate, ids, new_tokens, timing)
    for length, row in rows.items():
        for candidate, timing in zip(chosen, row, strict=True):
            progress(f"memory of {candidate.method}, {length} tokens")
            timing.peak_bytes = _peak(model, candidate, _prompt(model, length))
            timing.ttft_ratio = _ratio(timing.ttft_s, row[0].ttft_s)
            timing.token_ratio = _ratio(timing.token_s, row[0].token_s)
    return [timing for row in rows.values() for timing in row]


def _run(
    model: Any, candidate: Candidate, ids: Int[Tensor, "1 n"], new_tokens: int, into: Timing
) -> None:
    """One prompt and its decoding steps; seconds and bytes are added to `into`."""
    with _cache(model, candidate) as cache, torch.no_grad():
        token, seconds = _step(model, cache, ids)
        into.ttft_s.append(seconds)
        into.held_bytes, into.full_bytes = stored_bytes(cache)
        steps = []
        for _ in range(new_tokens):
            token, seconds = _step(model, cache, token)
            steps.append(seconds)
        into.token_s.append(median(steps))


def _peak(model: Any, candidate: Candidate, ids: Int[Tensor, "1 n"]) -> int | None:
    """Peak bytes of reading the prompt; a pass of its own, since measuring slows it down."""
    with _cache(model, candidate) as cache, torch.no_grad(), peak_memory(model.device) as peak:
        _step(model, cache, ids)
    return peak.bytes


@contextmanager
def _cache(model: Any, candidate: Candidate) -> Iterator[Any]:
    """A new cache, and the model attached if the cache is kvtrim's."""
    if candidate.method == PLAIN:
        yield plain_cache(model)
        return
    with attach(model):
        yield Cache(model, candidate.method, candidate.keep or 1, **candidate.settings)


def _step(model: Any, cache: Any, ids: Tensor) -> tuple[Tensor, float]:
    """The next token and the seconds until it is there."""
    synchronize(model.device)
    start = perf_counter()
    logits = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
    token = logits[:, -1].argmax(dim=-1, keepdim=True)
    synchronize(model.device)
    return token, perf_counter() - start


def _prompt(model: Any, length: int) -> Int[Tensor, "1 n"]:
    """Random tokens, the same for every candidate."""
    size = model.config.get_text_config(decoder=True).vocab_size
    draw = torch.Generator().manual_seed(length)
    return torch.randint(size // 10, size, (1, length), generator=draw).to(model.device)


def _range(values: Sequence[float]) -> list[float]:
    return [min(values), max(values)]


def _ratio(values: Sequence[float], reference: Sequence[float]) -> float:
    """Median of the rounds' own ratios, which a drifting machine disturbs least."""
    return median(a / b for a, b in zip(values, reference, strict=True))
