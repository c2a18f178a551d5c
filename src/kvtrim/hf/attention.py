"""The registered attention and mask functions: kvtrim's for its cache, else the stock ones.

One model may serve a kvtrim cache and an ordinary one in turn, so the mask function cannot know
what is needed. It returns a promise; only the layers that need the stock mask ever build it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvtrim.engine.call import Call
from kvtrim.errors import UnsupportedModelError, UsageError
from kvtrim.types import Tensor

NAME = "kvtrim"
"""Name of both functions in the registries; holds no word that transformers looks for."""

HANDLE = "kvtrim_cache"
"""Keyword of the attention pre-hook: (session, number, projection, rotation, hidden states)."""

_KNOWN_KEYWORDS = {"position_ids", "use_cache", "sliding_window", "output_attentions", "is_causal"}


@dataclass
class Mask:
    """The stock mask, made on first use and shared by the layers of one pass."""

    make: Callable[[], Tensor | None]
    _made: list[Tensor | None] = field(default_factory=list)

    def tensor(self) -> Tensor | None:
        """Boolean [B, 1, Q, S], True = attend; None = plain causal."""
        if not self._made:
            self._made.append(self.make())
        return self._made[0]


def register() -> None:
    """Make the two functions known to transformers under `NAME`. Changes no model."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def mask(**arguments: Any) -> Mask:
    """Mask function of transformers' `AttentionMaskInterface`."""
    return Mask(partial(sdpa_mask, **arguments))


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers' `AttentionInterface`: [B, H, Q, D] to [B, Q, H, D]."""
    handle = keywords.pop(HANDLE, None)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if handle is None:
        made = attention_mask.tensor() if isinstance(attention_mask, Mask) else attention_mask
        if softcap is not None:
            return _capped(query, key, value, made, scale, softcap), None
        out, _ = sdpa_attention_forward(
            module, query, key, value, made, dropout, scale, **keywords
        )
        return out, None
    if isinstance(attention_mask, Tensor):
        raise UsageError(
            "a kvtrim cache needs the 2-D attention mask [batch, tokens], not a prepared 4-D one"
        )
    unknown = [name for name in set(keywords) - _KNOWN_KEYWORDS if keywords[name] is not None]
    if unknown:
        raise UnsupportedModelError(
            f"{type(module).__name__} hands {', '.join(unknown)} to its attention, which kvtrim "
            "does not implement"
        )
    session, index, output, rotate, hidden = handle
    call = Call(query, key, value, scale, softcap, output.weight, output.factor, rotate, hidden)
    out = session.attend(index, call)
    return out.transpose(1, 2).contiguous(), None


def _capped(
    query: Tensor, key: Tensor, value: Tensor, made: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Ordinary attention with squashed logits, which the stock sdpa function refuses."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = softcap * torch.tanh(query @ key.transpose(-1, -2) * scale / softcap)
    if made is None and query.shape[2] > 1:
        made = torch.ones(logits.shape[-2:], dtype=torch.bool, device=query.device)
        made = made.tril(key.shape[2] - query.shape[2])
    if made is not None:
        logits = logits.masked_fill(~made, torch.finfo(logits.dtype).min)
    wide = torch.promote_types(query.dtype, torch.float32)
    weights = logits.softmax(dim=-1, dtype=wide).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous()
