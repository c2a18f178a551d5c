"""kvtrim: a small KV cache and a short prefill for Hugging Face models, without retraining.

Importing does nothing else: torch and transformers are loaded when something needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvtrim import moved
from kvtrim.errors import KvtrimError
from kvtrim.version import VERSION as __version__

if TYPE_CHECKING:
    from kvtrim.api import Result, compress, generate
    from kvtrim.engine.select import select
    from kvtrim.hf.attach import attach, detach
    from kvtrim.hf.cache import Cache, load_cache
    from kvtrim.hf.models.load import load
    from kvtrim.hf.view import view
    from kvtrim.methods.method import Method
    from kvtrim.methods.policies.base import Policy
    from kvtrim.methods.registry import METHODS
    from kvtrim.prompts.document import Document
    from kvtrim.types import LayerView, Scores

_LATER = {
    "METHODS": "kvtrim.methods.registry",
    "Method": "kvtrim.methods.method",
    "Cache": "kvtrim.hf.cache",
    "Document": "kvtrim.prompts.document",
    "LayerView": "kvtrim.types",
    "Policy": "kvtrim.methods.policies.base",
    "Result": "kvtrim.api",
    "Scores": "kvtrim.types",
    "attach": "kvtrim.hf.attach",
    "compress": "kvtrim.api",
    "detach": "kvtrim.hf.attach",
    "generate": "kvtrim.api",
    "load": "kvtrim.hf.models.load",
    "load_cache": "kvtrim.hf.cache",
    "select": "kvtrim.engine.select",
    "view": "kvtrim.hf.view",
}

moved.install()

__all__ = [
    "METHODS",
    "Cache",
    "Document",
    "KvtrimError",
    "LayerView",
    "Method",
    "Policy",
    "Result",
    "Scores",
    "__version__",
    "attach",
    "compress",
    "detach",
    "generate",
    "load",
    "load_cache",
    "select",
    "view",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LATER[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
