"""A probe: text read after the prompt and forgotten again, to see what it attends to.

KVzip probes a prompt with the order to repeat it, chunk by chunk. Whatever the probe is, the model
reads it against the full cache; a policy with `probes` observes each pass of it and scores what it
saw once the last pass is over.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvtrim.engine.cuts import Known
from kvtrim.errors import UsageError
from kvtrim.hf.base import cache_keyword
from kvtrim.hf.cache import Cache
from kvtrim.hf.sensitivity import Sensitivity
from kvtrim.prompts import Words
from kvtrim.types import Bool, Int, Probed, Tensor

REMEMBERED = 8
"""Tokens of the chunk before that tell the model where to go on."""


@dataclass(frozen=True)
class Step:
    """One pass of a probe over one prompt."""

    ids: list[int]
    probed: Probed


def repetition(ids: Sequence[int], words: Words, chunk: int) -> list[Step]:
    """The passes that make a model repeat a prompt.

    Source: KVzip, https://arxiv.org/abs/2505.23416; NVIDIA/kvpress@8bb29b9, kvzip_press.py.
    """
    steps, given = [], list(ids[: len(words.prefix)]) == words.prefix
    prefix = len(words.prefix) if given else 0
    for start in range(prefix, len(ids), chunk):
        part = list(ids[start : start + chunk])
        if start == prefix:
            request = words.first
        else:
            request = [*words.later, *ids[start - REMEMBERED : start]]
        probed = Probed(start, start + len(part))
        steps.append(Step([*request, *words.suffix, *part], probed))
    return steps


def probe(decoder: Any, cache: Cache, known: Known | None = None) -> None:
    """Probe the prompts that a cache has read, and evict.

    Args:
        decoder: the model without its head, attached.
        cache: of a method that probes, its prompts complete.
        known: what an equal probe under the same policy came to.

    Raises:
        UsageError: the prompt was fed as embeddings, so there is nothing to repeat.
    """
    if cache.token_ids is None:
        raise UsageError(
            "this method repeats its prompt, which takes token ids; feed input_ids, no embeddings"
        )
    real = cache.session.state.reading.mask(cache.token_ids.shape[0])
    chunk = cache.session.method.policy.chunk
    plans = [
        repetition(ids[mask].tolist(), cache.words, chunk)
        for ids, mask in zip(cache.token_ids.cpu(), real, strict=True)
    ]
    steps, untouched = max(len(plan) for plan in plans), cache.mark().sliding
    gradients = Sensitivity(cache, real) if cache.method.policy.differentiates else None
    for number in range(steps):
        now = [plan[number] if number < len(plan) else None for plan in plans]
        _read(decoder, cache, now, real, number == steps - 1, known, gradients)
        for layer, state in zip(cache.stock_layers(), untouched, strict=True):
            vars(layer).update(state)


def _read(
    decoder: Any,
    cache: Cache,
    now: list[Step | None],
    real: Bool[Tensor, "B seen"],
    last: bool,
    known: Known | None,
    gradients: Sensitivity | None,
) -> None:
    """One pass: a step of each prompt's probe, padded behind.

    Padding between a prompt and its probe would take the prompt's room in windows that slide.
    """
    device, lengths = decoder.device, cache.session.state.reading.lengths
    width = max(len(step.ids) for step in now if step is not None)
    ids, mask, positions = torch.zeros(3, len(now), width, dtype=torch.int64)
    for row, step in enumerate(now):
        count = 0 if step is None else len(step.ids)
        part = slice(0, count)
        ids[row, part] = torch.tensor([] if step is None else step.ids, dtype=torch.int64)
        mask[row, part] = 1
        positions[row, part] = lengths[row] + torch.arange(count)
    nothing = Probed(0, 0)
    probed = [nothing if step is None else step.probed for step in now]
    given = {
        "input_ids": ids.to(device),
        "attention_mask": _whole(real, mask).to(device),
        "position_ids": positions.to(device),
    }
    if gradients is not None:
        found = gradients.measure(given)
        probed = [
            replace(one, sensitivity=found[:, row, : 0 if step is None else len(step.ids)])
            for row, (one, step) in enumerate(zip(probed, now, strict=True))
        ]
    padded = None if bool(mask.all()) else mask
    cache.session.begin_probe(width, padded, probed, last, known)
    with torch.no_grad():
        decoder(**given, **cache_keyword(cache), use_cache=True)


def _whole(real: Bool[Tensor, "B seen"], mask: Int[Tensor, "B m"]) -> Int[Tensor, "B all"]:
    return torch.cat([real.long(), mask], dim=1)
