"""Does kvtrim work on this model? What its test suite proves, tried on the model itself."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from kvtrim.hf.attach import attach
from kvtrim.hf.cache import Cache
from kvtrim.hf.keyword import passing
from kvtrim.types import Tensor

_TOKENS, _STEPS = 96, 8


@dataclass(frozen=True)
class Finding:
    """One relation that must hold."""

    what: str
    passed: bool
    difference: float  # largest, relative to the largest logit


def check_model(model: Any) -> list[Finding]:
    """Compare logits with and without kvtrim on random tokens.

    Raises:
        UnsupportedModelError: the attention layers cannot be found at all.
    """
    size = model.config.get_text_config(decoder=True).vocab_size
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(size, (1, _TOKENS + _STEPS), generator=draw).to(model.device)
    plain = _logits(model, ids, DynamicCache(config=model.config))
    with attach(model, allow_untested=True):
        ordinary = _logits(model, ids, DynamicCache(config=model.config))
        full = _logits(model, ids, Cache(model, "full"))
        small = _logits(model, ids, Cache(model, "adakv", 48, window=8))
        slow = _logits(model, ids, Cache(model, "adakv", 48, window=8, impl="reference"))
    tolerance = 2e-2 if model.dtype in (torch.bfloat16, torch.float16) else 1e-3
    return [
        _finding("ordinary caches go on as before", ordinary, plain, tolerance),
        _finding("a full kvtrim cache gives the same logits", full, plain, tolerance),
        _finding(
            "prefill is untouched by eviction", small[:, :_TOKENS], plain[:, :_TOKENS], tolerance
        ),
        _finding(
            "attention over evicted layers equals the slow reference", small, slow, tolerance
        ),
    ]


def _logits(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Logits of a prompt and of single tokens after it."""
    with torch.no_grad():
        parts = [model(ids[:, :_TOKENS], **passing(cache)).logits]
        for at in range(_TOKENS, ids.shape[1]):
            parts.append(model(ids[:, at : at + 1], **passing(cache)).logits)
    return torch.cat(parts, dim=1).float()


def _finding(what: str, got: Tensor, want: Tensor, tolerance: float) -> Finding:
    difference = float((got - want).abs().max() / want.abs().max())
    return Finding(what, difference <= tolerance, difference)
