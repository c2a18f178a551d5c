"""Several caches of one model as one batch, so that their continuations share passes.

A pass over one token reads all weights whatever the batch, so continuing 16 caches together takes
little longer than one. Rows are independent; only the last bits of sums may differ from passes
over one row, as they do between any two batch sizes.
"""

from collections.abc import Sequence

import torch

from kvtrim.engine import joining
from kvtrim.errors import CacheError
from kvtrim.hf.abreast import Abreast
from kvtrim.hf.cache import Cache
from kvtrim.types import Int, Tensor

Kind = tuple[bool, tuple[int, ...]]


def kind(cache: Cache) -> Kind | None:
    """What tells caches apart that `join` had better not mix; None if it cannot take this one.

    True at first where nothing is evicted any more, so that entries can be put into one store;
    then in how many heads of each layer they are held. Layers that slide, or padding in what was
    read, keep a cache alone.
    """
    if isinstance(cache, Abreast):
        return False, joining.heads(cache.rows[0].session)
    if cache.stock_layers() or not joining.complete(cache.session):
        return None
    return joining.joinable(cache.session), joining.heads(cache.session)


def join(caches: Sequence[Cache]) -> Cache:
    """One cache with the prompts of all of these, in this order; they stay as they are.

    Prompts may be of different lengths: feed `positions(cache, Q)` as `position_ids`, and no mask.
    Those that go on evicting do so as they would alone.

    Raises:
        CacheError: one of them is of no `kind`, or they are of different models or granularity.
    """
    first, model, kinds = caches[0], caches[0].model, [kind(cache) for cache in caches]
    heads = {None if one is None else one[1] for one in kinds}
    same = None not in heads and len(heads) == 1 and all(one.model is model for one in caches)
    if model is None or not same:
        raise CacheError(
            "these caches cannot be continued together: they must be of one model and "
            "granularity, without sliding layers and padding; continue each of them alone"
        )
    if not all(one is not None and one[0] for one in kinds):
        return Abreast(model, caches)
    other = Cache(model, "full", 1, granularity=first.method.granularity)
    other.session.state = joining.joined([cache.session for cache in caches])
    return other


def positions(cache: Cache, columns: int) -> Int[Tensor, "B Q"]:
    """Where the next tokens of every prompt stand."""
    lengths = torch.tensor(cache.session.state.reading.lengths)
    return lengths[:, None] + torch.arange(columns)
