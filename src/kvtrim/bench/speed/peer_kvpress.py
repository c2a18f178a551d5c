"""kvpress as a peer of `speed`: its presses at the same budgets, driven as its pipeline does.

The prompt is read inside `with press(model)`, new tokens outside of it at the positions they would
have in a full cache. Importing kvpress changes transformers for the whole process. The warm-up
does it, before the first measurement, so that all rows of a run are measured alike.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from kvtrim.bench.candidates import Candidate, Subject
from kvtrim.errors import UsageError
from kvtrim.hf.base import cache_keyword
from kvtrim.hf.generate import plain_cache
from kvtrim.methods.keep import Keep
from kvtrim.methods.variant import Variant
from kvtrim.types import Tensor

NAME = "kvpress"
PRESSES = {
    "snapkv": "SnapKVPress",
    "adakv": "AdaKVPress",
    "pyramidkv": "PyramidKVPress",
    "tova": "TOVAPress",
    "knorm": "KnormPress",
    "keydiff": "KeyDiffPress",
    "random": "RandomPress",
    "streaming-llm": "StreamingLLMPress",
}
"""The press that stands beside a method of ours."""
_AROUND = {"AdaKVPress": "SnapKVPress"}  # presses that need another inside


def require() -> None:
    """Refuse if kvpress is not installed.

    Raises:
        UsageError: naming the command that installs it.
    """
    if find_spec(NAME) is None:
        raise UsageError(f"--peer {NAME}: it is not installed; pip install {NAME}")


def candidates(methods: Sequence[str], keeps: Sequence[str]) -> list[Candidate]:
    """The presses for the methods asked for; SnapKVPress if there is none for any of them."""
    asked = [Variant.parse(text).name for text in methods]
    names = [PRESSES[name] for name in dict.fromkeys(asked) if name in PRESSES]
    names = names or [PRESSES["snapkv"]]
    return [KVPress(f"{NAME}:{press}", keep, peer=NAME) for press in names for keep in keeps]


@dataclass(frozen=True)
class KVPress(Candidate):
    """One press with a budget."""

    @contextmanager
    def open(
        self, model: Any, length: int, chunk: int | None, capture: bool = True
    ) -> Iterator[Subject]:
        """A full cache that the press cuts once the prompt was read."""
        if chunk is not None and chunk < length:
            raise UsageError("kvpress reads a prompt in one pass; leave out --prefill-chunk")
        press = self._press(_ratio(self.keep, length))
        cache, seen = plain_cache(model), 0

        def feed(ids: Tensor) -> Tensor:
            nonlocal seen
            at = torch.arange(seen, seen + ids.shape[1], device=ids.device)
            own = {"position_ids": at.expand(len(ids), -1), "cache_position": at}
            with press(model) if seen == 0 else nullcontext():
                out = model(input_ids=ids, **cache_keyword(cache), logits_to_keep=1, **own)
            seen += ids.shape[1]
            return out.logits

        yield Subject(cache, feed, full=False)

    def _press(self, ratio: float) -> Any:
        library, name = import_module(NAME), self.method.partition(":")[2]
        if name in _AROUND:
            return getattr(library, name)(getattr(library, _AROUND[name])(compression_ratio=ratio))
        return getattr(library, name)(compression_ratio=ratio)


def _ratio(keep: str, length: int) -> float:
    """The share to evict that leaves this many entries after kvpress rounds down.

    Raises:
        UsageError: a budget in bytes.
    """
    budget = Keep.parse(keep)
    if budget.kind == "bytes":
        raise UsageError(f"kvpress knows no budget in bytes ({keep}); give tokens or a share")
    tokens = int(budget.per_head(length, 1) + 1e-6)
    return max(0.0, 1 - (tokens + 0.5) / length)
