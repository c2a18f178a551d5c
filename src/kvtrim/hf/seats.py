"""Seats for branches that get one token each, pass after pass, as a server's answers do.

Their entries and all that a pass is about are in buffers that stay where they are, so that on CUDA
the pass is a captured graph (`engine.graph.Capture`). It is captured anew when somebody joins. Who
leaves leaves an empty seat, until half of the seats are empty, or nobody is left of a prompt.
"""

from collections.abc import Sequence
from typing import Any

import torch

from kvtrim.engine.branch import Branch
from kvtrim.engine.graph import Capture
from kvtrim.engine.row import Row, SeatState
from kvtrim.hf.base import BaseCache, cache_keyword
from kvtrim.types import Float, Tensor


class Seats:
    """Branches that get one token each, pass after pass, and what such a pass is about.

    Args:
        branches: of which each has read something.
    """

    def __init__(self, branches: Sequence[Branch]):
        self.count, device = len(branches), branches[0].tails[0].keys.device
        self._state = SeatState.of(self.count, device)
        self.row = Row([(branch, 1) for branch in branches], self._state)
        self._places = {id(each): self.row.columns[id(each)].start for each in branches}
        self._sitting: dict[int, Branch] = {id(each): each for each in branches}
        self._empty = 0  # bytes
        behind = [0] * self.count  # where what each continues ends
        self._lengths = [0] * self.count
        for branch in branches:
            place = self._places[id(branch)]
            behind[place] = branch.position - len(branch.ids)
            self._lengths[place] = len(branch.ids)
        self._behind = torch.tensor(behind, device=device)
        self._ids = torch.zeros(1, self.count, dtype=torch.long, device=device)
        self._write([])

    def capture(self, model: Any, into: BaseCache) -> None:
        """Make the step, whose attention `into` hands to the row; on CUDA it is captured."""
        state, row, ids, behind = self._state, self.row, self._ids, self._behind

        def step() -> Float[Tensor, "N vocabulary"]:  # not of these seats, which would live on
            row.hide()
            given = {"position_ids": (state.lengths + behind)[None], **cache_keyword(into)}
            with torch.no_grad():
                return model(input_ids=ids, **given).logits[0]

        self._step = Capture(step, state.device)

    @property
    def plain(self) -> str | None:
        """Why the step is not captured, if it is not."""
        return self._step.plain

    @property
    def empty_bytes(self) -> int:
        """What is held for those who have left."""
        return self._empty

    def are_of(self, branches: Sequence[Branch]) -> bool:
        """Whether these sit here, and none else; those who do not come any more have left."""
        coming = {id(branch) for branch in branches}
        if not coming <= set(self._sitting):
            return False
        for branch in [each for each in self._sitting.values() if id(each) not in coming]:
            if not self.leave(branch):
                return False
        return all(
            len(branch.ids) < branch.room and self.row.is_seated(branch) for branch in branches
        )

    def leave(self, into: object) -> bool:
        """Its seat is empty from now on; whether the others stay, and nothing else is held."""
        branch = self._sitting.pop(id(into), None)
        if branch is not None:
            self._empty += branch.nbytes
        used = {id(base) for each in self._sitting.values() for base in each.bases}
        gone = [] if branch is None else [base for base in branch.bases if id(base) not in used]
        return not gone and 2 * len(self._sitting) >= self.count

    def vacate(self) -> None:
        """Everybody has entries elsewhere, so that the seats' can be freed."""
        for branch in self._sitting.values():
            branch.unstack()

    def step(self, tokens: Sequence[tuple[Branch, int]]) -> Float[Tensor, "N vocabulary"]:
        """One token more for each who sits here; logits in the order of these."""
        self._write(tokens)
        logits = self._step()
        for branch, token in tokens:
            branch.ids.append(token)
        return logits[[self._places[id(branch)] for branch, _ in tokens]]

    def _write(self, tokens: Sequence[tuple[Branch, int]]) -> None:
        """Say what the next pass is about; an empty seat stays as it is."""
        ids, taken = [0] * self.count, [False] * self.count
        for branch, token in tokens:
            place = self._places[id(branch)]
            ids[place], taken[place] = token, True
            self._lengths[place] = len(branch.ids)
        self._ids.copy_(torch.tensor([ids]))
        self._state.lengths.copy_(torch.tensor(self._lengths))
        self._state.taken.copy_(torch.tensor(taken))
