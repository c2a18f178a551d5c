"""A session as tensors and a JSON record, and back."""

from typing import Any

import torch

from kvtrim.cache.store import LayerStore
from kvtrim.engine.session import Session
from kvtrim.errors import CacheError, CacheFileError
from kvtrim.spans import fitted, per_prompt
from kvtrim.types import Tensor


def export(session: Session) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything needed to go on in another process; entries are packed, slack is left out.

    Raises:
        CacheError: nothing was read yet, or a pass was interrupted.
    """
    if session.under_way or not session.state.reading.seen:
        raise CacheError(
            "nothing to save: this cache has read no prompt, or a pass over it was interrupted"
        )
    tensors: dict[str, Tensor] = {}
    for index, held in enumerate(session.state.layers):
        if held.store is None:
            continue
        packed = held.store.copy()
        tensors |= {f"layers.{index}.{name}": buffer for name, buffer in packed.buffers.items()}
        tensors[f"layers.{index}.length"] = packed.length
        if held.queries is not None:
            tensors[f"queries.{index}"] = held.queries
        if held.hidden is not None:
            tensors[f"hidden.{index}"] = held.hidden
        if held.share is not None:
            tensors[f"share.{index}"] = held.share
    reading = session.state.reading
    if reading.real is not None:
        tensors["real"] = reading.real
    record = {
        "seen": reading.seen,
        "lengths": reading.lengths,
        "prompt_tokens": session.prompt_tokens,
        "cut_at": session.state.cut_at,
        "since_cut": session.state.since_cut,
        "keeps": session.state.keeps,
        "settled": session.state.settled,
        "probed": session.state.probed,
        "spans": session.state.spans,
        "generated": session.state.generated,
        "closed_up": session.state.closed_up,
        "full_entries": [held.full_entry for held in session.state.layers],
    }
    return tensors, record


def restore(
    session: Session,
    tensors: dict[str, Tensor],
    record: dict[str, Any],
    devices: list[torch.device],
) -> None:
    """Bring a new session into the exported state, each layer on its device.

    Raises:
        CacheFileError: the parts contradict each other.
    """
    try:
        reading = session.state.reading
        reading.seen, reading.lengths = record["seen"], record["lengths"]
        reading.real = tensors.get("real")
        session.prompt_tokens = record["prompt_tokens"]
        session.state.cut_at, session.state.since_cut = record["cut_at"], record["since_cut"]
        session.state.probed = record["probed"]
        session.state.keeps = [(entries, asked) for entries, asked in record["keeps"]]
        session.state.settled = [(tokens, held) for tokens, held in record.get("settled", [])]
        session.state.spans = fitted(per_prompt(record["spans"]), len(reading.lengths))
        session.state.generated = [(start, share) for start, share in record["generated"]]
        session.state.closed_up = record.get("closed_up", [])
        for index, held in enumerate(session.state.layers):
            held.full_entry = record["full_entries"][index]
            held.store = _store(tensors, f"layers.{index}.", reading.lengths, devices[index])
            queries = tensors.get(f"queries.{index}")
            held.queries = None if queries is None else queries.to(devices[index])
            hidden = tensors.get(f"hidden.{index}")
            held.hidden = None if hidden is None else hidden.to(devices[index])
            held.share = tensors.get(f"share.{index}")
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise CacheFileError(
            f"the saved cache is incomplete or inconsistent: {error!r}"
        ) from error


def _store(
    tensors: dict[str, Tensor], prefix: str, lengths: list[int], device: torch.device
) -> LayerStore:
    length = tensors[prefix + "length"]
    names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    buffers = {name: tensors[prefix + name].to(device) for name in names if name != "length"}
    total, positions = int(length.sum()), buffers["positions"]
    if bool((length < 0).any()) or any(buffer.shape[0] != total for buffer in buffers.values()):
        raise ValueError(f"{prefix}length does not match its entries")
    if length.shape[0] != len(lengths) or buffers["keys"].ndim != 2 or buffers["values"].ndim != 2:
        raise ValueError(
            f"{prefix}keys and values do not have the shape of {len(lengths)} prompts"
        )
    if total and not 0 <= int(positions.min()) <= int(positions.max()) < max(lengths):
        raise ValueError(f"{prefix}positions point outside of the prompt")
    return LayerStore.packed(buffers, length)
