"""kvtrim: a small KV cache and a short prefill for Hugging Face models, without retraining.

Importing does nothing else: torch and transformers are loaded when something needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvtrim.errors import KvtrimError
from kvtrim.version import VERSION as __version__

if TYPE_CHECKING:
    from kvtrim.answers import Result, compress, generate
    from kvtrim.documents import Document
    from kvtrim.engine.offline import select
    from kvtrim.hf.attach import attach, detach
    from kvtrim.hf.cache import Cache
    from kvtrim.hf.load import load
    from kvtrim.hf.saving import load_cache
    from kvtrim.methods import METHODS, Method

_LATER = {
    "METHODS": "kvtrim.methods",
    "Method": "kvtrim.methods",
    "Cache": "kvtrim.hf.cache",
    "Document": "kvtrim.documents",
    "Result": "kvtrim.answers",
    "attach": "kvtrim.hf.attach",
    "compress": "kvtrim.answers",
    "detach": "kvtrim.hf.attach",
    "generate": "kvtrim.answers",
    "load": "kvtrim.hf.load",
    "load_cache": "kvtrim.hf.saving",
    "select": "kvtrim.engine.offline",
}

__all__ = [
    "METHODS",
    "Cache",
    "Document",
    "KvtrimError",
    "Method",
    "Result",
    "__version__",
    "attach",
    "compress",
    "detach",
    "generate",
    "load",
    "load_cache",
    "select",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LATER[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
