"""Which models kvtrim is tested on, and what it reads off one: layers, windows, projections."""

from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvtrim.errors import UnsupportedModelError
from kvtrim.methods.policies.output import output_factor
from kvtrim.types import Float, Tensor

SUPPORTED = (
    *(
        "cohere",
        "cohere2",
        "exaone4",
        "flex_olmo",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
    ),
    *("granite", "llama", "ministral", "ministral3", "mistral", "mixtral", "olmo", "olmo2"),
    *("olmo3", "olmoe", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
    *("seed_oss", "smollm3", "stablelm", "starcoder2"),
)
"""`config.model_type` of the architectures that the test suite proves."""


_OUTPUT = ("o_proj", "dense")  # what the output projection is called; Phi's is dense


ACCEPTED: "WeakSet[PreTrainedModel]" = WeakSet()
"""Models that were loaded with `allow_untested`: whoever did so need not say it again."""


@dataclass(frozen=True)
class Layout:
    """The attention layers of a model, in order."""

    decoder: torch.nn.Module
    blocks: list[torch.nn.Module]  # decoder layers
    attention: list[torch.nn.Module]  # one module per decoder layer
    query_heads: int
    managed: list[int]  # layers that attend to everything; the others slide and are left alone
    around: list[torch.nn.Module]  # that the decoder is a part of, where they read images as well


def layout(model: PreTrainedModel, allow_untested: bool = False) -> Layout:
    """Find the attention layers that kvtrim can manage.

    Raises:
        UnsupportedModelError: an architecture outside `SUPPORTED` (unless allowed), or one whose
            parts cannot be found.
    """
    config = model.config.get_text_config(decoder=True)
    allowed = allow_untested or model in ACCEPTED
    if config.model_type not in SUPPORTED and not allowed:
        raise UnsupportedModelError(
            f"architecture {config.model_type!r} is untested; tested are {', '.join(SUPPORTED)}. "
            "Run `kvtrim check MODEL` to see whether it works, then pass "
            "allow_untested=True (--allow-untested)"
        )
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{config.model_type} caches a latent of {config.kv_lora_rank} numbers a token that "
            "all heads share (MLA); kvtrim would hold what every head makes of it, more than "
            "transformers' full cache. Use the model as it is"
        )
    decoder = model.get_decoder()
    blocks = list(getattr(decoder, "layers", []))
    attention = [module for block in blocks for module in _attention_in(block)]
    if not blocks or not len(blocks) == len(attention) == config.num_hidden_layers:
        raise UnsupportedModelError(
            f"{type(model).__name__}: cannot find one attention module "
            "with a layer_idx per decoder layer"
        )
    heads, managed = config.num_attention_heads, _managed_layers(config)
    return Layout(decoder, blocks, attention, heads, managed, _around(model, decoder))


def window(model: Any) -> int:
    """Tokens that a model has positions for."""
    return model.config.get_text_config(decoder=True).max_position_embeddings


def head_width(config: Any) -> int:
    """Numbers of one key, as the configuration says."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def states_of(given: Any) -> torch.Tensor:
    """The hidden states among what a decoder layer, or another module, gives."""
    return given[0] if isinstance(given, tuple) else given


def _around(model: PreTrainedModel, decoder: torch.nn.Module) -> list[torch.nn.Module]:
    """The outer modules of an image-text model; none in a text model."""
    if model.config.get_text_config(decoder=True) is model.config:
        return []
    inner = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return [
        module
        for module in inner
        if module is not decoder and any(part is decoder for part in module.modules())
    ]


def _attention_in(block: torch.nn.Module) -> list[torch.nn.Module]:
    children = block.children()
    return [
        child for child in children if hasattr(child, "layer_idx") and hasattr(child, "scaling")
    ]


def _managed_layers(config: Any) -> list[int]:
    """Layers whose cache would grow with the whole input."""
    managed = []
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) is DynamicLayer or _never_slides(layer, config):
            managed.append(index)
        elif type(layer) is not DynamicSlidingWindowLayer:
            raise UnsupportedModelError(
                f"layer {index} of {config.model_type} caches a {type(layer).__name__}; "
                "kvtrim manages layers with ordinary or sliding-window attention only"
            )
    if not managed:
        raise UnsupportedModelError(
            f"every layer of this {config.model_type} model slides over "
            f"{config.sliding_window} tokens: its cache is bounded already, "
            "there is nothing to evict"
        )
    return managed


def _never_slides(layer: Any, config: Any) -> bool:
    """A window that no input of this model can fill (Phi-3.5 declares 262,144)."""
    window = getattr(layer, "sliding_window", None)
    return window is not None and window >= config.max_position_embeddings


def require_managed(model: PreTrainedModel, managed: list[int]) -> None:
    """Refuse models some layers of which slide: what these would see of a part is undefined.

    Raises:
        UnsupportedModelError: saying how many.
    """
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    if len(managed) != layers:
        raise UnsupportedModelError(
            f"{layers - len(managed)} of the {layers} layers of this model slide over a window of "
            "neighbouring tokens; methods that let deeper layers read a part of the prompt cannot "
            "serve it. Use one that only evicts, such as snapkv"
        )


class OutputProjection:
    """W_O of one layer by query head, and the factor that stands for it in norms.

    The factor is computed once, and again if the weight is another or was changed.
    """

    def __init__(self, module: torch.nn.Module, heads: int):
        self._module, self._heads = module, heads
        self._made: tuple[Tensor, int, Tensor] | None = None  # weight, its version, its factor

    def weight(self) -> Float[Tensor, "H E M"]:
        """The slice of the projection that each query head feeds.

        Raises:
            UnsupportedModelError: the projection is not a plain floating-point matrix.
        """
        weight = self._weight()
        local = getattr(weight, "to_local", lambda: weight)()
        return local.detach().unflatten(1, (self._heads, -1)).permute(1, 2, 0)

    def factor(self) -> Float[Tensor, "H E E"]:
        """See `ops.output_factor`. Raises as `weight`."""
        weight = self._weight()
        version = 0 if weight.is_inference() else weight._version
        if self._made is None or self._made[0] is not weight or self._made[1] != version:
            self._made = (weight, version, output_factor(self.weight()))
        return self._made[2]

    def _weight(self) -> Tensor:
        name = next((name for name in _OUTPUT if hasattr(self._module, name)), _OUTPUT[0])
        weight = getattr(getattr(self._module, name, None), "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise UnsupportedModelError(
                f"{type(self._module).__name__} has no floating-point {name}.weight; this method "
                "weighs values by it"
            )
        return weight
