"""What a saved cache must agree with: everything of a model that decides what its K and V mean.

Weights are sampled inside every tensor, so that a change of any whole row or column of any of them
is seen and an 8B model still takes a fraction of a second. Beside them stand all values of the
configuration, the plain values that modules hold (an epsilon, a scale), buffers, which classes
the modules have, hooks that somebody hung on them, and the state of adapters.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from transformers import PreTrainedModel

from kvtrim.errors import ModelError
from kvtrim.hf.models.architectures import head_width
from kvtrim.types import Int, Tensor

_SAMPLES = 2**18  # of one tensor at most: more than an embedding has rows
_BUFFER = 64  # values of a buffer that are stored
_SAME = 1e-4  # relative difference up to which two of those are one: devices round differently
_GOLDEN = (math.sqrt(5) - 1) / 2

_NO_MATTER = frozenset(  # values of a configuration that change no logits
    "transformers_version architectures dtype torch_dtype use_cache return_dict "
    "output_attentions output_hidden_states id2label label2id problem_type "
    "chunk_size_feed_forward pad_token_id bos_token_id eos_token_id "
    "initializer_range initializer_factor model_type attn_implementation auto_map "
    "quantization_config".split()
)
_OWN = frozenset(("rope_parameters", "num_hidden_layers", "num_attention_heads"))
_PASSING = frozenset(  # attributes of modules that change no logits, or change as a model is used
    "training gradient_checkpointing name_or_path fullgraph max_seq_len_cached warnings_issued "
    "supports_gradient_checkpointing is_quantized loss_type".split()
)
_ADAPTER = ("active_adapter", "active_adapters", "disable_adapters", "merged_adapters", "scaling")
_KNOWN_HOOKS = ("kvtrim.", "transformers.", "accelerate.", "torch.")

Found = Mapping[str, Any]


def shape(model: PreTrainedModel) -> dict[str, Any]:
    """What people would say a model is: architecture, sizes, RoPE and number format."""
    config = model.config.get_text_config(decoder=True)
    return {
        "architecture": config.model_type,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": head_width(config),
        "rope": _plain(config.rope_parameters),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def of_model(model: PreTrainedModel) -> dict[str, Any]:
    """Shape and weights, for the record of a run."""
    return shape(model) | {"weights": _weights(model)}


def complete(model: PreTrainedModel) -> dict[str, Any]:
    """Everything that decides what K and V mean, small enough to store and compare.

    Attached or not, a model has the same. Compare with `differences`.
    """
    return of_model(model) | {
        "config": _config(model),
        "attributes": _attributes(model),
        "modules": _hash(f"{name} {type(each).__name__}" for name, each in model.named_modules()),
        "changed": _changes(model),
        "adapters": _adapters(model),
        "buffers": _buffers(model),
    }


def identity(model: PreTrainedModel) -> str:
    """Hash of shape, RoPE and weights; the same whether loaded in float32 or in bfloat16."""
    record = shape(model) | {"dtype": None, "weights": _weights(model, torch.bfloat16)}
    return _hash([json.dumps(record, sort_keys=True)])


def of_tokenizer(tokenizer: Any) -> str:
    """Hash of the vocabulary, the special tokens and the chat template."""
    parts = [
        sorted(tokenizer.get_vocab().items()),
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
    ]
    return _hash([json.dumps(parts, default=str)])


def differences(saved: Found, here: Found, same_library: bool = True) -> list[str]:
    """Readable differences between two fingerprints: "layers: 30 saved, 32 here".

    Args:
        same_library: both were made with one version of transformers. If not, a value that only
            one of the versions knows says nothing: a new one begins with what was done before.
    """
    found = []
    for name, value in here.items():
        old = saved.get(name)
        if name == "buffers":
            found += [] if _close(old, value) else [f"{name}: of other values"]
        elif isinstance(value, dict) and isinstance(old, dict) and name != "rope":
            keys = [k for k in dict.fromkeys([*old, *value]) if old.get(k) != value.get(k)]
            keys = [k for k in keys if same_library or (k in old and k in value)]
            found += [f"{k}: {old.get(k)} saved, {value.get(k)} here" for k in keys]
        elif old != value:
            found.append(f"{name}: {old} saved, {value} here")
    return found


def _hash(parts: Iterable[str]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode(errors="surrogatepass"))
    return total.hexdigest()[:16]


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value, sort_keys=True, default=str))


# What is not a tensor


def _config(model: PreTrainedModel) -> dict[str, Any]:
    """Every value of the text model's configuration that may change what it computes."""
    values = model.config.get_text_config(decoder=True).to_dict()
    told = {name for name in values if name.startswith("_")} | _NO_MATTER | _OWN
    return _plain({name: value for name, value in values.items() if name not in told})


def _attributes(model: PreTrainedModel) -> dict[str, str]:
    """For each plain attribute of modules a hash of its values in all of them."""
    values: dict[str, list[str]] = {}
    for module, name, value in _walk_attributes(model):
        if isinstance(value, bool | int | float | str) and not _is_passing(name):
            values.setdefault(name, []).append(f"{module}={value!r} ")
    return {name: _hash(found) for name, found in sorted(values.items())}


def _walk_attributes(model: PreTrainedModel) -> Iterator[tuple[str, str, Any]]:
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            yield name, attribute, value


def _is_passing(name: str) -> bool:
    return name.startswith("_") or name in _PASSING or name.endswith("max_seq_len_cached")


def _changes(model: PreTrainedModel) -> dict[str, list[str]]:
    """Modules whose outcome somebody changes from outside, by a hook or another `forward`.

    Left out is what kvtrim, transformers and accelerate do, which change where, not what.
    """
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        names = [f"{home}{title}" for home, title in map(_name_of, hooks) if _foreign(home)]
        own = vars(module)
        if "forward" in own and "_hf_hook" not in own:
            names.append("".join(_name_of(own["forward"])))
        if names:
            found[name] = sorted(names)
    return found


def _name_of(call: Callable[..., Any]) -> tuple[str, str]:
    """The module ("kvtrim.hf.") and the name of what is called in the end."""
    while isinstance(call, partial):
        call = call.func
    call = getattr(call, "__func__", call)
    name = getattr(call, "__qualname__", type(call).__qualname__)
    return f"{getattr(call, '__module__', type(call).__module__)}.", name


def _foreign(home: str) -> bool:
    return not home.startswith(_KNOWN_HOOKS)


def _adapters(model: PreTrainedModel) -> dict[str, Any]:
    """What layers with adapters say of them: which are active, merged, and how strong."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for attribute in _ADAPTER:
            value = getattr(module, attribute, None)
            if isinstance(value, bool | str | list | dict):  # else it is no adapter's
                found[f"{name}.{attribute}"] = _plain(value)
    return found


# Tensors


def _buffers(model: PreTrainedModel) -> dict[str, list[float]]:
    """Some values of every buffer. RoPE that changes as a text gets longer counts as it began."""
    found = {}
    for name, buffer in model.named_buffers():
        place, _, own = name.rpartition(".")
        module = model.get_submodule(place)
        kinds = getattr(module, "rope_type", None)
        kinds = list(kinds.values()) if isinstance(kinds, dict) else [str(kinds)]
        if own.endswith("inv_freq") and any("dynamic" in k or k == "longrope" for k in kinds):
            first = own if "original" in own else own.replace("inv_freq", "original_inv_freq")
            buffer = getattr(module, first, buffer)
        if not buffer.is_meta:
            few = buffer.detach().flatten()[:: max(1, math.ceil(buffer.numel() / _BUFFER))]
            found[name] = few.double().cpu().tolist()
    return found


def _close(saved: Any, here: Mapping[str, list[float]]) -> bool:
    if not isinstance(saved, dict) or saved.keys() != here.keys():
        return False
    return all(_close_values(saved[name], values) for name, values in here.items())


def _close_values(saved: Any, here: list[float]) -> bool:
    if not isinstance(saved, list) or len(saved) != len(here):
        return False
    pairs = zip(saved, here, strict=True)
    return all(type(a) in (int, float) and math.isclose(a, b, rel_tol=_SAME) for a, b in pairs)


def _weights(model: PreTrainedModel, dtype: torch.dtype | None = None) -> str:
    """Hash of a sample of every parameter: tells two fine-tunes of one architecture apart."""
    total = hashlib.sha256()
    for name, parameter in model.named_parameters():
        local = getattr(parameter, "to_local", lambda own=parameter: own)().detach()
        if local.is_meta:
            local = _offloaded_weight(model, name)
        total.update(f"{name} {list(parameter.shape)}".encode())
        some = sample(local)
        some = some.to(dtype) if dtype is not None and some.is_floating_point() else some
        total.update(some.contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]


def sample(tensor: Tensor) -> Tensor:
    """Elements of a tensor [N], on the CPU: one at least in every row and in every column.

    Rows are all dimensions but the last. They are taken along a lattice, so that they also lie
    evenly; of a tensor with more than `_SAMPLES` rows or columns, so many.
    """
    if tensor.ndim == 0:
        return tensor.reshape(1).cpu()
    if not tensor.numel():
        return tensor.reshape(-1).cpu()
    table = tensor.flatten(0, -2) if tensor.ndim > 1 else tensor[None]
    rows, columns = _places(*table.shape, table.device)
    return table[rows, columns].cpu()


@lru_cache(maxsize=64)
def _places(
    rows: int, columns: int, device: torch.device
) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
    """The rows and columns of the elements that are looked at."""
    most = max(rows, columns)
    walk = torch.arange(min(most, _SAMPLES), device=device) * max(1, most // _SAMPLES)
    along_rows = walk % rows if rows >= columns else walk * _step(rows) % rows
    along_columns = walk % columns if rows < columns else walk * _step(columns) % columns
    return along_rows, along_columns


def _step(count: int) -> int:
    """A stride near the golden section that visits every one of so many places."""
    step = max(1, round(_GOLDEN * count))
    while math.gcd(step, count) != 1:
        step += 1
    return step


def _offloaded_weight(model: PreTrainedModel, name: str) -> Tensor:
    """A parameter that accelerate keeps elsewhere while it is not needed."""
    place, _, own = name.rpartition(".")
    hook: Any = vars(model.get_submodule(place)).get("_hf_hook")
    for one in getattr(hook, "hooks", [hook]):
        kept = getattr(one, "weights_map", None)
        if kept is not None and own in kept:
            return kept[own]
    raise ModelError(
        f"the weights of {name} are not in memory, so a cache cannot be tied to them; "
        "load the model whole (device='cpu')"
    )
