"""What a machine does at best, copying and multiplying, and what a model asks of it.

`docs/speed.md` derives the floors that `kvtrim.report.speed` computes from these figures.
"""

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

from kvtrim.hf.generate import synchronize
from kvtrim.hf.models.architectures import head_width

_TRIALS = 5  # the best of these counts: a limit is what was possible


def of_machine(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Bytes that a copy moves per second (read and written), and FLOP of a square product."""
    cuda = device.type == "cuda"
    source = torch.randn(2**27 if cuda else 2**25, device=device)  # zeros may move faster
    target = torch.empty_like(source)
    size = 8192 if cuda else 1024
    left = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(left)
    copied = _best(lambda: target.copy_(source), device)
    multiplied = _best(lambda: torch.mm(left, left, out=out), device)
    return {
        "copy_bytes_per_s": 2 * source.nbytes / copied,
        "matmul_flop_per_s": 2 * size**3 / multiplied,
    }


def of_model(model: Any) -> dict[str, int]:
    """What one token costs: FLOP in the layers' matrices, in attention, and bytes of weights."""
    config = model.config.get_text_config(decoder=True)
    layers = model.get_decoder().layers
    linear = [m for m in layers.modules() if isinstance(m, torch.nn.Linear)]
    head = head_width(config)
    total = sum(parameter.nbytes for parameter in model.parameters())
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return {
        "layers_flop_per_token": 2 * sum(m.weight.numel() for m in linear),
        "head_flop_per_token": 2 * outputs.numel(),
        "attention_flop_per_pair": 4 * len(layers) * config.num_attention_heads * head,
        "weight_bytes": total if outputs is inputs else total - inputs.nbytes,
    }


def _best(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of a few trials; one before them is not counted."""
    found = []
    for _ in range(_TRIALS + 1):
        synchronize(device)
        start = perf_counter()
        work()
        synchronize(device)
        found.append(perf_counter() - start)
    return min(found[1:])
