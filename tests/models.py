"""Tiny random models of every supported architecture, and a byte tokenizer.

Nothing is downloaded.
"""

import copy
from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from kvtrim.hf.attach import attachment_of

WINDOW = 16  # of the layers that slide
_SIZES = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SLIDING = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}
_CONFIGS = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "mistral": lambda: MistralConfig(**_SIZES, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**_SIZES),
    "qwen3": lambda: Qwen3Config(**_SIZES),
    "phi3": lambda: Phi3Config(**{**_SIZES, "hidden_size": 48}, sliding_window=None),
    "gemma2": lambda: Gemma2Config(**_SIZES, **_SLIDING),
    "gemma3_text": lambda: Gemma3TextConfig(**_SIZES, **_SLIDING),
}
ARCHITECTURES = tuple(_CONFIGS)
"""Those that the deep tests go through."""

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
_FURTHER = {
    "cohere": {},
    "cohere2": _SLIDING,
    "exaone4": _SLIDING,
    "flex_olmo": _EXPERTS,
    "gemma": {},
    "glm": {},
    "glm4": {},
    "granite": {},
    "ministral": _SLIDING,
    "ministral3": {"sliding_window": None},
    "mixtral": _LOCAL,
    "olmo": {},
    "olmo2": {},
    "olmo3": _SLIDING,
    "olmoe": _EXPERTS,
    "phi": {},
    "phimoe": _LOCAL,
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": _EXPERTS,
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "stablelm": {},
    "starcoder2": {"sliding_window": None},
}
MIXED = ("flex_olmo", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe")
FURTHER = tuple(_FURTHER)
"""Those that tests/hf/test_models.py goes through."""

_CHAT = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def config(architecture: str, **sizes: int):
    """A fresh configuration of a tiny model; `sizes` are others than those above."""
    if architecture in _CONFIGS:
        made = _CONFIGS[architecture]()
        for name, size in sizes.items():
            setattr(made, name, size)
        return made
    return AutoConfig.for_model(architecture, **_SIZES, **_FURTHER[architecture])


def tiny(
    architecture: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float64, **sizes: int
):
    """A fresh random model; float64, so that equal means equal. Random numbers go on from it.

    Its weights want no gradients: what runs without `no_grad` remembers nothing for them.
    """
    made, drawn = _first(architecture, seed, dtype, **sizes)
    torch.set_rng_state(drawn)
    return copy.deepcopy(made)  # half the time of drawing all weights again


@cache
def _first(architecture: str, seed: int, dtype: torch.dtype, **sizes: int):
    """A model that nobody uses, and the state of the generator that drew it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(architecture, **sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:  # sharper attention than random initialisation gives
                parameter.mul_(6)
    if architecture in MIXED:
        model.set_experts_implementation("eager")  # the others know no float64
    return model.to(dtype).eval().requires_grad_(False), torch.get_rng_state()


@cache
def tokenizer(chat: bool = True, lines: bool = False) -> PreTrainedTokenizerFast:
    """Bytes as tokens 4 to 259, and <pad>, <s>, </s>; with `lines` two line breaks as one more."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "<s>", "</s>", "<unk>", *alphabet]
    merges = [("\u010a", "\u010a")] if lines else []
    names += ["".join(pair) for pair in merges]
    known = {name: i for i, name in enumerate(names)}
    raw = Tokenizer(models.BPE(known, merges, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    fast.chat_template = _CHAT if chat else None
    return fast


def prompt(length: int, seed: int = 0, rows: int = 1) -> torch.Tensor:
    """Random token ids [rows, length]."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(4, 260, (rows, length), generator=draw)


def positions(cache, row=0):
    """Positions that a cache holds of one prompt: a list for each layer and head."""
    found = []
    for store in cache.session.state.stores():
        runs = zip(store.start[row].tolist(), store.length[row].tolist(), strict=True)
        where = store.buffers["positions"].tolist()
        found.append([where[first : first + count] for first, count in runs])
    return found


def is_attached(model):
    """Whether kvtrim caches work on this model now."""
    return attachment_of(model) is not None
