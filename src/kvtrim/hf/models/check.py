"""Does kvtrim work on this model? What its test suite proves, tried on the model itself."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kvtrim.errors import KvtrimError
from kvtrim.hf.attach import attach
from kvtrim.hf.base import cache_keyword
from kvtrim.hf.cache import Cache
from kvtrim.hf.generate import plain_cache
from kvtrim.hf.models.architectures import layout
from kvtrim.types import Tensor

_TOKENS, _STEPS = 96, 4


@dataclass(frozen=True)
class Finding:
    """One relation that must hold."""

    what: str
    passed: bool
    difference: float | None  # largest, relative to the largest logit; None where it has no value
    why: str = ""  # what went wrong, where no logits came


def check_model(model: Any) -> list[Finding]:
    """Compare logits with and without kvtrim on random tokens.

    What the model raises meanwhile, be it transformers' or its own, is a finding as well.

    Raises:
        UnsupportedModelError: the attention layers cannot be found at all.
    """
    layout(model, allow_untested=True)
    size = model.config.get_text_config(decoder=True).vocab_size
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(size, (1, _TOKENS + _STEPS), generator=draw).to(model.device)
    tolerance = 2e-2 if model.dtype in (torch.bfloat16, torch.float16) else 1e-3

    def attempt(make: Callable[[], Any]) -> Tensor | str:
        try:
            return _logits(model, ids, make())
        except KvtrimError as error:
            return str(error)
        except Exception as error:  # whatever stands in a model's own code
            return f"{type(error).__name__}: {error}"

    def compare(what: str, got: Any, want: Any, tokens: int) -> Finding:
        failed = next((each for each in (want, got) if isinstance(each, str)), None)
        if failed is not None:
            return Finding(what, False, None, " ".join(failed.split()))
        off = float((got - want)[:, :tokens].abs().max() / want[:, :tokens].abs().max())
        return Finding(what, off <= tolerance, off if math.isfinite(off) else None)

    plain = attempt(lambda: plain_cache(model))
    with attach(model, allow_untested=True):
        ordinary = attempt(lambda: plain_cache(model))
        full = attempt(lambda: Cache(model, "full"))
        small = attempt(lambda: Cache(model, "adakv", 48, window=8))
        slow = attempt(lambda: Cache(model, "adakv", 48, window=8, impl="reference"))
    whole = _TOKENS + _STEPS
    return [
        compare("ordinary caches go on as before", ordinary, plain, whole),
        compare("a full kvtrim cache gives the same logits", full, plain, whole),
        compare("prefill is untouched by eviction", small, plain, _TOKENS),
        compare("attention over evicted layers equals the slow reference", small, slow, whole),
    ]


def _logits(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Logits of a prompt and of single tokens after it."""
    with torch.no_grad():
        parts = [model(ids[:, :_TOKENS], **cache_keyword(cache)).logits]
        for at in range(_TOKENS, ids.shape[1]):
            parts.append(model(ids[:, at : at + 1], **cache_keyword(cache)).logits)
    return torch.cat(parts, dim=1).float()
