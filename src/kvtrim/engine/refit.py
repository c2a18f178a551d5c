"""Refitting: reference queries are gathered as a prompt is read, and kept entries fitted to them.

What the full cache answers is worked out where a layer is cut, before anything leaves it. Layers
that share one budget are refitted once the last of them was read and the counts are settled.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kvtrim.cache.store import BIAS, LayerStore
from kvtrim.engine.layer import Call, Held
from kvtrim.engine.tokens import Pass
from kvtrim.errors import UsageError
from kvtrim.methods.refit import Refit, aim_of
from kvtrim.types import Aim, Float, Int, LayerView, Probed, Tensor

BEHIND = 64
"""So many positions behind the prompt its own queries are turned to where no refit says."""

Aims = dict[int, dict[int, Aim]]
"""For each layer and prompt what its full cache answers."""


def gather_references(
    counts: Sequence[int],
    behind: int,
    call: Call,
    now: Pass,
    held: Held,
    totals: Sequence[int],
    probed: Sequence[Probed] | None,
) -> tuple[Float[Tensor, "H r D"], ...]:
    """Each prompt's reference queries so far, this pass's included.

    Args:
        counts: how many of each query head, for each use; what one use shares with another is
            gathered once.
        behind: so many positions behind the prompt its own queries are turned to.
        totals: tokens of each complete prompt.
        probed: what each prompt's probe is about, if this pass reads one; its queries stand behind
            the prompt already.

    Raises:
        UsageError: the prompt's own queries have to be turned, and the call has no rotation.
    """
    found = []
    for row, total in enumerate(totals):
        real = torch.arange(now.columns) if now.real is None else now.real[row].cpu()
        if probed is None:
            at = now.row_positions(row, torch.device("cpu"))[0, 0].long()
            chosen = torch.cat([_evenly(at, most, total) for most in counts]).unique()
            own = _take(call.queries[row], real[chosen])
            own = _turn(call, own, (total + behind - at[chosen]).to(own.device))
        else:
            about = probed[row].stop - probed[row].start
            share = -(-max(counts) * about // max(1, total))
            own = _take(
                call.queries[row], real[_evenly(torch.arange(len(real)), share, len(real))]
            )
        before = () if held.references is None else (held.references[row],)
        found.append(torch.cat([*before, own], dim=1))
    return tuple(found)


def references_of_head(for_kv_head: int, call: Call) -> int:
    """How many queries of each query head are so many of a KV head, all taken together."""
    return -(-for_kv_head * call.keys.shape[1] // call.queries.shape[1])


def of_one_use(
    references: Float[Tensor, "*B r D"], counts: Sequence[int], most: int, total: int
) -> Float[Tensor, "*B a D"]:
    """Those of the prompt's own reference queries that were gathered for one of the uses.

    Args:
        most: the count of that use, one of `counts`.
    """
    every = torch.arange(total)
    gathered = torch.cat([_evenly(every, count, total) for count in counts]).unique()
    own = torch.searchsorted(gathered, _evenly(every, most, total))
    return references[..., own.to(references.device), :]


def _evenly(at: Int[Tensor, " n"], most: int, total: int) -> Int[Tensor, " r"]:
    """Which of these positions are among `most` that lie evenly in `total`, wherever cut."""
    if most >= total:
        return torch.arange(len(at))
    return ((at * most // total) != ((at - 1) * most).div(total, rounding_mode="floor")).nonzero()[
        :, 0
    ]


def _take(queries: Float[Tensor, "H S D"], columns: Int[Tensor, " r"]) -> Float[Tensor, "H r D"]:
    return queries[:, columns.to(queries.device)]


def _turn(
    call: Call, queries: Float[Tensor, "H r D"], by: Int[Tensor, " r"]
) -> Float[Tensor, "H r D"]:
    if call.rotate is None:
        raise UsageError(
            "a refit and echo turn the prompt's queries with the model's rotary embedding, and "
            "none was given; use kvtrim.Cache on a model, pass select(..., rotate=...), or set "
            "refit=none and, with echo, asked=0"
        )
    flat = queries.flatten(0, 1)
    return call.rotate(flat, by.repeat(queries.shape[0])).view_as(queries)


@dataclass
class Refitting:
    """The refits of one pass over all layers."""

    refit: Refit
    known: Aims | None = None  # of an equal pass
    aims: Aims = field(default_factory=dict)
    _logits: dict[int, tuple[float, float | None]] = field(default_factory=dict)

    def aim(self, index: int, view: LayerView, rows: slice, references: Sequence[Tensor]) -> None:
        """Note what a layer answers before it is cut, for a group of its prompts."""
        own = self.aims.setdefault(index, {})
        self._logits[index] = view.scale, view.softcap
        kv_heads = view.keys.shape[1]
        for number, row in enumerate(range(rows.start, rows.stop)):
            if self.known is not None and row in self.known.get(index, {}):
                own[row] = self.known[index][row]
                continue
            queries = torch.cat([references[row], self._last(view, number)], dim=1)
            queries = queries.unflatten(0, (kv_heads, -1)).flatten(1, 2)
            given = queries, view.keys[number], view.values[number]
            own[row] = aim_of(*given, view.scale, view.softcap)
            if self.known is not None:
                self.known.setdefault(index, {})[row] = own[row]

    def _last(self, view: LayerView, number: int) -> Float[Tensor, "H r D"]:
        """The last queries of a prompt, if they are wanted; a probe's are references already."""
        count = 0 if view.probed is not None else min(self.refit.last, view.queries.shape[2])
        return view.queries[number, :, view.queries.shape[2] - count :]

    def apply(self, index: int, store: LayerStore) -> None:
        """Refit what stayed of a layer."""
        store.settle()
        if self.refit.biases and self.aims.get(index):
            store.add_column(BIAS)
        for row, aim in self.aims.pop(index, {}).items():
            part = store.row(row)
            dense, _ = part.dense()
            given = aim, dense["keys"][0], dense["values"][0], part.length
            became = self.refit.fit(*given, *self._logits[index])
            part.set_column("values", became.values[None])
            if became.bias is not None:
                part.set_column(BIAS, became.bias[None])
