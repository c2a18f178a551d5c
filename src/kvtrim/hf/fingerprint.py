"""What a saved cache must agree with: architecture, RoPE, weights, number format and tokenizer."""

import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedModel

from kvtrim.types import Target, Tensor

_SAMPLES = 16  # parameters that are looked at, evenly spread over the model
_ELEMENTS = 256  # leading elements of each


def of_model(model: PreTrainedModel) -> dict[str, Any]:
    """Everything that decides what K and V mean, small enough to store and compare."""
    config = model.config.get_text_config(decoder=True)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "architecture": config.model_type,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": head,
        "rope": json.loads(json.dumps(config.rope_parameters, sort_keys=True, default=str)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": _weights(model),
    }


def target(model: PreTrainedModel, layers: int) -> Target:
    """What a budget is told of a model of which kvtrim manages so many layers."""
    config = model.config.get_text_config(decoder=True)
    name = model.config.name_or_path or f"this {config.model_type} model"
    return Target(name, layers, config.num_attention_heads, lambda: identity(model))


def identity(model: PreTrainedModel) -> str:
    """Hash of shape, RoPE and weights; the same whether loaded in float32 or in bfloat16."""
    record = of_model(model) | {"dtype": None, "weights": _weights(model, torch.bfloat16)}
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def of_tokenizer(tokenizer: Any) -> str:
    """Hash of the vocabulary, the special tokens and the chat template."""
    parts = [
        sorted(tokenizer.get_vocab().items()),
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
    ]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def differences(saved: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Readable differences between two fingerprints: "layers: 30 saved, 32 here"."""
    names = [name for name in here if saved.get(name) != here[name]]
    return [f"{name}: {saved.get(name)} saved, {here[name]} here" for name in names]


def _weights(model: PreTrainedModel, dtype: torch.dtype | None = None) -> str:
    """Hash of a sample of the weights: tells two fine-tunes of one architecture apart."""
    total = hashlib.sha256()
    parameters = list(model.named_parameters())
    for name, parameter in parameters[:: max(1, len(parameters) // _SAMPLES)]:
        total.update(f"{name} {list(parameter.shape)}".encode())
        total.update(_bytes(parameter, dtype))
    return total.hexdigest()[:16]


def _bytes(parameter: Tensor, dtype: torch.dtype | None) -> bytes:
    local = getattr(parameter, "to_local", lambda: parameter)()
    start = local.detach().flatten()[:_ELEMENTS].cpu().to(dtype or local.dtype).contiguous()
    return start.view(torch.uint8).numpy().tobytes()
