"""How much the model's last hidden states depend on what each attention adds, token by token.

The probe is read with gradients by the model's own attention over an ordinary cache of the full
entries, which nothing of kvtrim's stands in the way of.

Source: KVgrad, https://openreview.net/forum?id=cg1wTCJjjk; NVIDIA/kvpress 0.5.5,
presses/kvgrad_press.py.
"""

import copy
from typing import Any

import torch
from transformers import DynamicCache

from kvtrim.errors import CacheError, UnsupportedModelError
from kvtrim.hf.base import cache_keyword
from kvtrim.hf.cache import Cache
from kvtrim.hf.layers import WindowLayer
from kvtrim.hf.models.architectures import layout, states_of
from kvtrim.types import Bool, Float, Tensor


class Sensitivity:
    """Gradients of a probe's passes over one full cache.

    Args:
        cache: its prompts are complete, and nothing was evicted.
        real: which columns of the prompts are no padding.
    """

    def __init__(self, cache: Cache, real: Bool[Tensor, "B seen"]):
        if cache.model is None:
            raise CacheError("the model of this cache does not exist any more")
        self._cache, self._real, self._config = cache, real, cache.model.config
        parts = layout(cache.model, allow_untested=True)
        self._attention = [parts.attention[layer] for layer in parts.managed]
        self._decoder: Any = parts.decoder
        self._last = parts.blocks[-1]
        with torch.inference_mode(False):
            self._layers = self._copy_layers()

    def measure(self, given: dict[str, Any]) -> Float[Tensor, "L B Q"]:
        """|d objective / d output of the attention| of each token, per layer that is managed.

        The objective is the sum, over the tokens of the pass, of the squared norms of the last
        decoder layer's outputs.

        Args:
            given: the pass as the decoder takes it, without a cache.
        """
        outputs: dict[int, Tensor] = {}
        last: list[Tensor] = []
        hooks = [
            self._decoder.get_input_embeddings().register_forward_hook(_require_grad),
            self._last.register_forward_hook(lambda _, args, out: last.append(states_of(out))),
        ]
        for number, module in enumerate(self._attention):
            hooks.append(module.register_forward_hook(_note(outputs, number)))
        with torch.inference_mode(False), torch.enable_grad():
            given = {name: each.clone() for name, each in given.items()}  # of inference mode
            try:
                self._decoder(**given, **cache_keyword(self._ordinary()), use_cache=True)
            finally:
                for hook in hooks:
                    hook.remove()
            real = given["attention_mask"][:, -last[0].shape[1] :].bool()
            objective = last[0].float()[real].square().sum()
            wanted = [outputs[number] for number in range(len(self._attention))]
            gradients = torch.autograd.grad(objective, wanted, allow_unused=True)
        if any(each is None for each in gradients):
            raise UnsupportedModelError(
                "gradients do not reach every attention layer of this model; use kvzip-plus"
            )
        return torch.stack([each.float().norm(dim=-1).cpu() for each in gradients])

    def _ordinary(self) -> DynamicCache:
        """What transformers itself would hold after the prompts.

        A pass gives the copied layers tensors of their own, and leaves those of the others.
        """
        ordinary = DynamicCache(config=self._config)
        ordinary.layers[:] = map(copy.copy, self._layers)
        return ordinary

    def _copy_layers(self) -> list[Any]:
        """The layers of such a cache, with copies of what is held."""
        text = self._config.get_text_config(decoder=True)
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        ordinary = DynamicCache(config=self._config)
        stores = self._cache.session.state.stores()
        for number, store in zip(self._cache.managed, stores, strict=True):
            dense, _ = store.dense()
            keys, values = (self._by_column(dense[name], heads) for name in ("keys", "values"))
            ordinary.update(keys, values, number)
        for number, layer in enumerate(self._cache.layers):
            if isinstance(layer, WindowLayer):
                ordinary.layers[number] = copy.copy(layer)
                for name in ("keys", "values"):
                    setattr(ordinary.layers[number], name, getattr(layer, name).clone())
        return ordinary.layers

    def _by_column(self, held: Float[Tensor, "B H S D"], heads: int) -> Float[Tensor, "B K n D"]:
        """Entries of every KV head in the columns that the prompts came in."""
        own = held[:, :: held.shape[1] // heads]  # where query heads hold entries of their own
        if bool(self._real.all()):
            return own.clone()
        found = own.new_zeros(*own.shape[:2], self._real.shape[1], own.shape[3])
        for row, real in enumerate(self._real.to(own.device)):
            found[row, :, real] = own[row, :, : int(real.sum())]
        return found


def _require_grad(module: torch.nn.Module, args: Any, out: Tensor) -> None:
    """Hook of the embedding: a graph begins here, where no parameter asks for one."""
    if not out.requires_grad:
        out.requires_grad_(True)


def _note(outputs: dict[int, Tensor], number: int) -> Any:
    """A hook that notes what a module returned."""

    def hook(module: torch.nn.Module, args: Any, out: Any) -> None:
        outputs[number] = states_of(out)

    return hook
