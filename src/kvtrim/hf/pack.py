"""Tokens of many caches as one row of one pass: prompts and answers of any lengths together.

A pass over one token reads all weights, whatever else goes through it. So the new tokens of
whoever has any are laid one behind the other; only attention knows whose they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvtrim.engine import branch as branches
from kvtrim.engine.branch import Branch
from kvtrim.engine.layer import Call
from kvtrim.errors import CacheError
from kvtrim.hf.cache import Cache
from kvtrim.hf.keyword import passing
from kvtrim.types import Float, Tensor


@dataclass(frozen=True)
class Feed:
    """The next tokens of one cache or branch."""

    into: Branch | Cache
    ids: list[int]


def position(into: Branch | Cache) -> int:
    """Where the next token of a branch or of a cache of one prompt stands."""
    if isinstance(into, Branch):
        return into.position
    state = into.session.state
    return (state.reading.lengths or [0])[0] - sum(state.closed_up)


class Pack(Cache):
    """What a pass over several feeds reads into. The model has to be attached.

    Caches among them have one prompt each, which is read, and no sliding layers.
    """

    def __init__(self, model: Any):
        super().__init__(model, "full", 1)
        if self.stock_layers() or self.switch is not None:
            raise CacheError(
                "some layers of this model slide, or its RoPE changes with the length, so several "
                "prompts cannot share a pass over it; use kvtrim.generate"
            )
        reading = self.session.state.reading
        reading.seen, reading.lengths = 1, [1]  # not the beginning of a prompt, whatever comes
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
        try:
            with torch.no_grad():
                out = model(
                    input_ids=torch.tensor([ids], device=device),
                    position_ids=torch.tensor([at], device=device),
                    **passing(self),
                    logits_to_keep=(ends - 1).to(device),
                )
        except BaseException:
            self.session.steps = None
            raise
        for each in feeds:
            if isinstance(each.into, Branch):
                each.into.ids += each.ids
        return out.logits[0]

    def begin_pass(self, rows: int, columns: int, mask: Tensor | None, ids: Tensor | None) -> None:
        """New tokens are coming."""
        self.session.steps = self  # `attend` below is asked in the place of the session's
        for into, part in self._feeds:
            if isinstance(into, Cache):
                own = None if ids is None else ids[:, part]
                into.begin_pass(1, part.stop - part.start, None, own)

    def attend(self, index: int, call: Call) -> Float[Tensor, "1 H Q E"]:
        """Every feed's attention over what it holds; then evict what is due."""
        own = [(into, part) for into, part in self._feeds if isinstance(into, Branch)]
        found = iter(branches.attend(own, index, call) if own else [])
        return torch.cat(
            [
                next(found)
                if isinstance(into, Branch)
                else into.session.attend(index, call.columns(part))
                for into, part in self._feeds
            ],
            dim=2,
        )

    def end_pass(self) -> None:
        """Every layer has attended."""
        self.session.steps = None
        for into, _ in self._feeds:
            if isinstance(into, Cache):
                into.end_pass()
