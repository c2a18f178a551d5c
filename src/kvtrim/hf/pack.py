"""Tokens of many caches as one row of one pass: prompts and answers of any lengths together.

A pass over one token reads all weights, whatever else goes through it. So the new tokens of
whoever has any are laid one behind the other; only attention knows whose they are.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from kvtrim.engine import branch as branches
from kvtrim.engine.branch import Branch
from kvtrim.engine.layer import Attends, Call
from kvtrim.errors import CacheError
from kvtrim.hf.base import BaseCache, Coming, cache_keyword
from kvtrim.hf.cache import Cache
from kvtrim.hf.layers import ManagedLayer
from kvtrim.types import Float, Int, Tensor


@dataclass(frozen=True)
class Feed:
    """The next tokens of one cache or branch."""

    into: Branch | Cache
    ids: list[int]


def position(into: Branch | Cache) -> int:
    """Where the next token of a branch or of a cache of one prompt stands."""
    return into.position if isinstance(into, Branch) else sum(into.ends)


@dataclass
class _Read:
    """What layers tell transformers: not the beginning of a prompt, whatever comes."""

    seen: int = 1
    recording: bool = False


class Pack(BaseCache):
    """What a pass over several feeds reads into. The model has to be attached.

    Caches among them have one prompt each, which is read, and no sliding layers. Nothing is held
    here between passes.

    Raises:
        CacheError: a model with layers that slide, or a RoPE that changes with the length.
    """

    def __init__(self, model: Any):
        like, self._read = Cache(model, "full", 1), _Read()
        super().__init__(model, copy.copy(like.rope), [])
        if like.stock_layers() or like.rope.switch is not None:
            raise CacheError(
                "some layers of this model slide, or its RoPE changes with the length, so several "
                "prompts cannot share a pass over it; use kvtrim.generate"
            )
        self.layers = [ManagedLayer(self._read) for _ in like.layers]
        self._feeds: list[tuple[Branch | Cache, slice]] = []

    def feed(self, model: Any, feeds: Sequence[Feed]) -> Float[Tensor, "N vocabulary"]:
        """One pass; logits after the last token of each feed.

        If it fails branches are as before, and caches are of no use any more.
        """
        ids = [token for each in feeds for token in each.ids]
        starts = [position(each.into) for each in feeds]
        at = [s + n for s, each in zip(starts, feeds, strict=True) for n in range(len(each.ids))]
        ends = torch.tensor([len(each.ids) for each in feeds]).cumsum(0)
        firsts = [0, *ends.tolist()[:-1]]
        self._feeds = [
            (each.into, slice(first, first + len(each.ids)))
            for each, first in zip(feeds, firsts, strict=True)
        ]
        turning = (each.into.rotations for each in feeds if isinstance(each.into, Cache))
        self.rotations = next((own for own in turning if own), [])
        device = model.device
        with torch.no_grad():
            out = model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.tensor([at], device=device),
                **cache_keyword(self),
                logits_to_keep=(ends - 1).to(device),
            )
        for each in feeds:
            if isinstance(each.into, Branch):
                each.into.ids += each.ids
        return out.logits[0]

    def begin_pass(self, coming: Coming) -> None:
        for into, part in self._feeds:
            if isinstance(into, Cache):
                own = None if coming.ids is None else coming.ids[:, part]
                into.begin_pass(Coming(1, part.stop - part.start, None, own))

    def attend(self, index: int, call: Call) -> Float[Tensor, "1 H Q E"]:
        """Every feed's attention over what it holds; then evict what is due."""
        own = [(into, part) for into, part in self._feeds if isinstance(into, Branch)]
        found = iter(branches.attend(own, index, call) if own else [])
        return torch.cat(
            [
                next(found)
                if isinstance(into, Branch)
                else into.attends.attend(index, call.columns(part))
                for into, part in self._feeds
            ],
            dim=2,
        )

    @property
    def attends(self) -> Attends:
        return self

    def end_pass(self) -> bool:
        for into, _ in self._feeds:
            if isinstance(into, Cache):
                into.end_pass()
        return False

    def take_announcement(self) -> bool:
        return False

    @property
    def seen(self) -> int:
        return self._read.seen

    @property
    def lengths(self) -> list[int]:
        return [self._read.seen]

    @property
    def closed_up(self) -> list[int]:
        return []

    @property
    def held_bytes(self) -> int:
        return 0

    @property
    def full_bytes(self) -> int:
        return 0

    def entries(self) -> list[Int[Tensor, "B K"]]:
        return []

    # What a pack is not asked

    def expect(self, tokens: int) -> None:
        self._refuse()

    def mark(self) -> Any:
        self._refuse()

    def rewind(self, mark: Any) -> None:
        self._refuse()

    def require_croppable(self, count: int) -> None:
        self._refuse()

    def take_back(self, count: int) -> None:
        self._refuse()

    def reset(self) -> None:
        self._refuse()

    def copy(self) -> "Pack":
        self._refuse()

    def select_rows(self, rows: Int[Tensor, " R"]) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise CacheError("a pack holds nothing between passes; ask the caches that it feeds")
