"""Models whose rotary frequencies are others above a length (Phi-3): a cache stays on one side.

Keys that were turned by one set of frequencies do not go with queries turned by the other. Phi-3's
own `generate` throws its cache away at that length and reads everything again.
"""

from kvtrim.errors import CacheError
from kvtrim.hf.cache import Cache


def enter(cache: Cache, ends: list[int], first: bool) -> None:
    """New tokens are coming that end at these positions; the cache remembers their side.

    Args:
        first: nothing was read before them.

    Raises:
        CacheError: what is held was turned by the other frequencies.
    """
    if cache.switch is not None:
        if not first:
            _require_one_side(cache.switch, _beyond(cache, max(ends)), max(ends))
        cache.beyond = max(ends) > cache.switch


def require_reach(cache: Cache, first: int, last: int) -> None:
    """Refuse in advance what would begin with `first` tokens and go on to `last`.

    Raises:
        CacheError: the model's frequencies would change on the way.
    """
    if cache.switch is None or (cache.seen == 0 and cache.method.propagation.restarts):
        return
    end = last - max(cache.session.state.closed_up, default=0)
    beyond = _beyond(cache, end) if cache.seen else first > cache.switch
    _require_one_side(cache.switch, beyond, end)


def _beyond(cache: Cache, end: int) -> bool:
    """Whether what is held was turned as beyond the switch."""
    if cache.beyond is not None or cache.switch is None:
        return bool(cache.beyond)
    state = cache.session.state  # of a file, or joined from several caches
    ups = state.closed_up or [0] * len(state.reading.lengths)
    sides = {n - by > cache.switch for n, by in zip(state.reading.lengths, ups, strict=True)}
    return sides.pop() if len(sides) == 1 else not end > cache.switch


def _require_one_side(switch: int, beyond: bool, end: int) -> None:
    if (end > switch) != beyond:
        held, coming = ("beyond", "below") if beyond else ("below", "beyond")
        raise CacheError(
            f"this model turns keys by other rotary frequencies from {switch:,} tokens on, and "
            f"tokens {coming} that (up to {end:,}) do not go with a cache read {held} it; "
            f"read everything in one pass of more than {switch:,} tokens (context and question "
            "together), or stay below with a shorter context or fewer new tokens"
        )
