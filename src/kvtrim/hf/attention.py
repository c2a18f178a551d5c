"""The registered attention and mask functions: kvtrim's for its cache, else the stock ones.

An attached model serves ordinary caches by the functions that it had before, mask and attention.
In a pass over a kvtrim cache the mask function returns a promise: only the layers that slide need
the stock mask, and only they ever build it.
"""

import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, NoReturn, cast
from weakref import ref

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from kvtrim.engine.layer import Attends, Call
from kvtrim.errors import UnsupportedModelError, UsageError
from kvtrim.hf.models.architectures import OutputProjection
from kvtrim.hf.rotary import Rotation
from kvtrim.types import Tensor

NAME = "kvtrim"
"""Name of both functions in the registries; holds no word that transformers looks for."""

HANDLE = "kvtrim_cache"
"""Keyword by which the attention pre-hook hands over a `Handle`."""


class Handle(NamedTuple):
    """What a managed layer needs to know of the cache that it reads into."""

    attends: Attends
    number: int
    output: OutputProjection
    rotate: Rotation | None
    hidden: Tensor  # what the attention received


_KNOWN_KEYWORDS = {"position_ids", "use_cache", "sliding_window", "output_attentions", "is_causal"}
_OF_OTHERS = {"output_router_logits", "output_hidden_states", "num_items_in_batch"}
_OF_OTHERS |= {"tokenizer", "assistant_tokenizer"}  # `generate` lets them through
"""Keywords that mean nothing to attention."""


class _Managing(threading.local):
    """Whether the pass that this thread is in reads into a kvtrim cache."""

    cache = False


managing = _Managing()


class _Stock:
    """The attention implementation that each configuration names when nothing is attached."""

    def __init__(self) -> None:
        # by identity: configurations compare by value, and two models may share one
        self._names: dict[int, tuple[Callable[[], Any], str | None, int]] = {}

    def take(self, config: Any, like: Any = None) -> None:
        """One more attachment changes this configuration, which may be a copy of another."""
        key = id(config)
        if key not in self._names:
            name = self.of(config if like is None else like)
            self._names[key] = ref(config, partial(_forget, self._names, key)), name, 0
        weak, name, count = self._names[key]
        self._names[key] = weak, name, count + 1

    def give_back(self, config: Any) -> None:
        """One less; with the last one it is as it was, unless somebody else has changed it."""
        weak, name, count = self._names[id(config)]
        if count > 1:
            self._names[id(config)] = weak, name, count - 1
            return
        del self._names[id(config)]
        if config._attn_implementation == NAME:
            config._attn_implementation_internal = name

    def of(self, config: Any) -> str | None:
        """The name that stood there, or stands there.

        In a pass over a kvtrim cache, layers that cap their logits take the plain attention in the
        place of torch's, which leaves the cap out (transformers does so itself from 5.23 on).
        """
        known = self._names.get(id(config))
        name = config._attn_implementation if known is None else known[1]
        caps = managing.cache and getattr(config, "attn_logit_softcapping", None) is not None
        return "eager" if caps and name == "sdpa" else name

    def attention(self, module: torch.nn.Module) -> Callable[..., Any]:
        """The function that a module's attention goes through when nothing is attached."""
        name = self.of(getattr(module, "config", None))
        if name in (None, NAME):
            return sdpa_attention_forward  # a copy of a part of an attached model
        return AttentionInterface().get_interface(name, _eager(module))

    def is_eager(self, module: torch.nn.Module) -> bool:
        """Whether that is the plain attention of the model's own file."""
        return self.of(getattr(module, "config", None)) == "eager"

    def mask(self, config: Any) -> Callable[..., Any]:
        """The function that makes its masks."""
        name, known = self.of(config), AttentionMaskInterface()
        if name in (None, NAME):
            return sdpa_mask
        return known[name] if name in known else _none


stock = _Stock()


def _forget(names: dict[int, Any], key: int, _: Any) -> None:
    names.pop(key, None)


def _eager(module: torch.nn.Module) -> Any:
    """The plain attention that stands in the file of a model's own modules."""
    files = (sys.modules.get(kind.__module__) for kind in type(module).__mro__)
    found = (getattr(file, "eager_attention_forward", None) for file in files)
    return next((function for function in found if function is not None), sdpa_attention_forward)


def _none(**arguments: Any) -> None:
    """What transformers makes for attention functions that bring no masks of their own."""


@dataclass
class Mask:
    """The stock mask, made on first use and shared by the layers of one pass."""

    make: partial[Any]
    _made: list[Any] = field(default_factory=list)
    _causal: bool | None = None

    def redeem(self) -> Any:
        """What the stock attention takes."""
        if not self._made:
            self._made.append(self.make())
        return self._made[0]

    @property
    def padding(self) -> Tensor | None:
        """The 2-D mask [batch, tokens] that it is made from."""
        return self.make.keywords.get("attention_mask")

    def require_causal(self) -> None:
        """Refuse tokens that see later ones, as those of an image or of a prefix do.

        Raises:
            UnsupportedModelError: saying so.
        """
        if self._causal is None:
            self._causal = _is_causal(**self.make.keywords)
        if not self._causal:
            raise UnsupportedModelError(
                "this model lets tokens of its prompt see later ones (images, or a prefix that is "
                "read both ways); kvtrim reads from left to right only"
            )


def padding(mask: Any) -> Tensor | None:
    """The 2-D mask [batch, tokens] that a decoder's argument is or was made from.

    Raises:
        UsageError: it is a prepared mask of another kind.
        UnsupportedModelError: it lets tokens see later ones.
    """
    masks = list(mask.values()) if isinstance(mask, Mapping) else [mask]
    promised = [each for each in masks if isinstance(each, Mask)]
    if promised and len(promised) == len(masks):
        for each in promised:
            each.require_causal()
        return promised[0].padding
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        raise UsageError("a kvtrim cache needs the 2-D attention mask [batch, tokens] or none")
    return mask


def _is_causal(
    batch_size: int,
    q_length: int,
    q_offset: Any,
    mask_function: Callable[..., Tensor],
    device: Any = None,
    **_: Any,
) -> bool:
    """Whether no token sees the next one; patterns that cannot be asked that count as not."""
    if mask_function is causal_mask_function or q_length == 1:
        return True
    now = torch.arange(q_length - 1, device=device)[None] + q_offset
    rows = torch.arange(batch_size, device=device)[:, None]
    try:
        return not bool(mask_function(rows, torch.zeros_like(rows), now, now + 1).any())
    except (IndexError, RuntimeError, TypeError):  # it takes one number at a time
        return False


def register() -> None:
    """Make the two functions known to transformers under `NAME`. Changes no model."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def mask(**arguments: Any) -> Any:
    """Mask function of transformers' `AttentionMaskInterface`."""
    make = partial(stock.mask(arguments.get("config")), **arguments)
    return Mask(make) if managing.cache else make()


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
) -> tuple[Tensor, Any]:
    """Attention function of transformers' `AttentionInterface`: [B, H, Q, D] to [B, Q, H, D]."""
    handle: Handle | None = keywords.pop(HANDLE, None)
    if handle is None:
        made = attention_mask.redeem() if isinstance(attention_mask, Mask) else attention_mask
        given = {} if softcap is None else {"softcap": softcap}
        given |= keywords
        slides = isinstance(attention_mask, Mask) and keywords.get("s_aux") is None
        if slides and query.dtype == torch.float64 and stock.is_eager(module):
            return _wide(query, key, value, made, scaling, softcap), None
        return stock.attention(module)(
            module, query, key, value, made, dropout=dropout, scaling=scaling, **given
        )
    if isinstance(attention_mask, Tensor):
        raise UsageError(
            "a kvtrim cache needs the 2-D attention mask [batch, tokens], not a prepared 4-D one"
        )
    if isinstance(attention_mask, Mask):
        attention_mask.require_causal()
    if getattr(module, "is_causal", True) is False:
        raise UnsupportedModelError("kvtrim reads from left to right only; this model does not")
    known = _KNOWN_KEYWORDS | _OF_OTHERS
    unknown = [name for name in set(keywords) - known if keywords[name] is not None]
    if unknown:
        raise UnsupportedModelError(
            f"{type(module).__name__} hands {', '.join(unknown)} to its attention, which kvtrim "
            "does not implement"
        )
    attends, index, output, rotate, hidden = handle
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    call = Call(query, key, value, scale, softcap, output.weight, output.factor, rotate, hidden)
    out = attends.attend(index, call).transpose(1, 2).contiguous()
    if torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value)):
        out = cast(Tensor, _NoGradient.apply(out, query, key, value))
    return out, None


def _wide(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """Plain attention all in the queries' format; that of transformers has an fp32 softmax.

    Layers that slide take it beside layers that kvtrim manages, which are as exact.
    """
    scale, groups = query.shape[-1] ** -0.5 if scaling is None else scaling, query.shape[1]
    key, value = (x.repeat_interleave(groups // x.shape[1], 1) for x in (key, value))
    logits = query @ key.transpose(-1, -2) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits if mask is None else logits + mask
    return (logits.softmax(dim=-1) @ value).transpose(1, 2).contiguous()


class _NoGradient(torch.autograd.Function):
    """Stands where gradients would be lost: what is stored has no history."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *given: Tensor) -> Tensor:
        return out.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
        raise UsageError(
            "gradients do not pass through a kvtrim cache; train with an ordinary cache or none, "
            "and run the model under torch.no_grad() otherwise"
        )
