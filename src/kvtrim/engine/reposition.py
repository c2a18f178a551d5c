"""Rolled positions: keys act as if they stood at their slot numbers 0 to S-1, queries at theirs.

RoPE is relative: only distances count, and the distance from the newest query, in slot S - 1, to
slot s is S - 1 - s. So a key that was read at position p, under a newest query at position P, is
turned on to position P - (S - 1 - s). That takes no unrotated copy of the cache and one turn of
the keys before the last gap; behind it slots and positions run in step already.

Paper: Xiao et al. 2023 (StreamingLLM), https://arxiv.org/abs/2309.17453, section 3.2.
Code:  mit-han-lab/streaming-llm@2e50426, pos_shift/modify_llama.py, which caches keys before RoPE.
Ours:  every KV head counts its own slots where heads hold different numbers of them.
"""

import torch

from kvtrim.cache.store import LayerStore
from kvtrim.engine.layer import Call
from kvtrim.errors import UsageError
from kvtrim.types import Int, Tensor


def roll(store: LayerStore, call: Call, newest: list[int]) -> LayerStore:
    """The store as attention sees it: the same one if no key has to move, else with other keys.

    Args:
        store: one that owns its entries; never changed.
        call: brings the model's rotation.
        newest: position of each prompt's last token.

    Raises:
        UsageError: a key has to move and the call has no rotation.
    """
    shift = _shift(store, newest)
    moved = shift.nonzero()[:, 0]
    if not len(moved):
        return store
    if call.rotate is None:
        raise UsageError(
            "positions='rolled' turns keys with the model's rotary embedding, and none was given; "
            "use kvtrim.Cache on a model, pass Call(rotate=...), or set positions='original'"
        )
    keys = store.keys.clone()
    keys[moved] = call.rotate(keys[moved], shift[moved])
    return LayerStore({**store.buffers, "keys": keys}, store.start, store.length, store.capacity)


def _shift(store: LayerStore, newest: list[int]) -> Int[Tensor, " T"]:
    """How far the key in each flat slot has to move; 0 in the slack."""
    device, total = store.keys.device, store.keys.shape[0]
    first = torch.tensor(newest)[:, None] - (store.length - 1) - store.start
    heads = torch.stack([first, store.start + store.length]).flatten(1).to(device)
    sizes = store.capacity.flatten().to(device)
    first, ends = heads.repeat_interleave(sizes, dim=1, output_size=total)
    slots = torch.arange(total, device=device)
    return (first + slots - store.buffers["positions"]).masked_fill(slots >= ends, 0)
