"""A session as tensors and a JSON record, and back."""

import math
import re
from collections.abc import Callable
from typing import Any

import torch

from kvtrim.cache.store import LayerStore, starts_of
from kvtrim.engine.session import Session
from kvtrim.errors import CacheError, CacheFileError
from kvtrim.prompts.spans import per_prompt, per_row, require_within
from kvtrim.types import Counts, Tensor

_KV = ("keys", "values")


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
        for row, own in enumerate(held.references or ()):
            tensors[f"references.{index}.{row}"] = own
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
        "due_at": session.state.due_at,
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
        _require_record(record, len(session.state.layers))
        _require_alike(tensors, len(session.state.layers))
        reading = session.state.reading
        reading.seen, reading.lengths = record["seen"], record["lengths"]
        reading.real = _real(tensors.get("real"), record)
        session.state.prompt_tokens = record["prompt_tokens"]
        session.state.cut_at, session.state.due_at = record["cut_at"], list(record["due_at"])
        once = session.method.schedule.every is None and session.prompt_tokens is None
        session.state.appended_from = session.state.cut_at if once else reading.seen
        session.state.probed = record["probed"]
        session.state.keeps = [(entries, asked) for entries, asked in record["keeps"]]
        session.state.settled = [(tokens, held) for tokens, held in record["settled"]]
        session.state.spans = per_row(per_prompt(record["spans"]), len(reading.lengths))
        require_within(session.state.spans, [reading.seen] * len(reading.lengths))
        session.state.generated = [(start, share) for start, share in record["generated"]]
        session.state.closed_up = record["closed_up"]
        for index, held in enumerate(session.state.layers):
            held.full_entry = record["full_entries"][index]
            held.store = _store(tensors, f"layers.{index}.", reading.lengths, devices[index])
            queries = _of_rows(tensors.get(f"queries.{index}"), 4, reading.lengths)
            held.queries = None if queries is None else queries.to(devices[index])
            hidden = _of_rows(tensors.get(f"hidden.{index}"), 3, reading.lengths)
            held.hidden = None if hidden is None else hidden.to(devices[index])
            names = [f"references.{index}.{row}" for row in range(len(reading.lengths))]
            if names and names[0] in tensors:
                held.references = tuple(tensors[name].to(devices[index]) for name in names)
            held.share = _of_rows(tensors.get(f"share.{index}"), 2, reading.lengths)
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CacheFileError(
            f"the saved cache is incomplete or inconsistent: {error or type(error).__name__}"
        ) from error


def _require(right: bool, what: str) -> None:
    if not right:
        raise ValueError(f"{what} cannot be")


def _whole(value: Any, least: int = 0, most: int | None = None) -> bool:
    return type(value) is int and least <= value and (most is None or value <= most)


def _real_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _require_record(record: dict[str, Any], layers: int) -> None:
    """Refuse numbers that no session comes to."""
    seen, lengths = record["seen"], record["lengths"]
    _require(_whole(seen, 1), f"seen={seen!r}")
    _require(isinstance(lengths, list) and bool(lengths), f"lengths={lengths!r}")
    _require(all(_whole(length, 0, seen) for length in lengths), f"lengths={lengths!r}")
    prompt = record["prompt_tokens"]
    _require(prompt is None or _whole(prompt, 1), f"prompt_tokens={prompt!r}")
    _require(_whole(record["cut_at"], 0, seen), f"cut_at={record['cut_at']!r}")
    _require(isinstance(record["probed"], bool), "probed")
    own: dict[str, Callable[[Any], bool]] = {
        "keeps": lambda each: _whole(each[0]) and _real_number(each[1]) and each[1] >= 0,
        "settled": lambda each: _whole(each[0]) and _real_number(each[1]) and each[1] >= 0,
        "generated": lambda each: _whole(each[0], 0, seen) and 0 <= each[1] <= 1,
        "closed_up": lambda each: _whole(each, 0, seen),
        "due_at": lambda each: _whole(each, 0, seen),
    }
    for name, right in own.items():
        given = record[name]
        few = () if name == "due_at" else (0,)
        fits = isinstance(given, list) and len(given) in (*few, len(lengths))
        _require(fits and all(right(each) for each in given), f"{name}={given!r}")
    entries = record["full_entries"]
    fits = isinstance(entries, list) and len(entries) == layers
    _require(fits and all(_whole(each) for each in entries), f"full_entries={entries!r}")


def _require_alike(tensors: dict[str, Tensor], layers: int) -> None:
    """Every layer has what the others have: a method does the same in all of them."""
    named = [re.fullmatch(r"(\w+)\.(\d+)(\.\w+)?", name) for name in tensors]
    found = [(each[1], each[3], int(each[2])) for each in named if each and each[1] != "sliding"]
    for part, column in {(part, column) for part, column, _ in found}:
        there = {layer for *own, layer in found if own == [part, column]}
        _require(there == set(range(layers)), f"{part}{column or ''} in some layers alone")


def _real(real: Tensor | None, record: dict[str, Any]) -> Tensor | None:
    """Which columns hold tokens; must agree with how many each prompt has."""
    lengths, seen = record["lengths"], record["seen"]
    if real is None:
        alike = bool(record["closed_up"]) or all(length == seen for length in lengths)
        _require(alike, f"seen={seen} with lengths={lengths}")
        return None
    fits = real.dtype == torch.bool and list(real.shape) == [len(lengths), seen]
    _require(fits and real.sum(-1).tolist() == lengths, "real")
    return real


def _of_rows(tensor: Tensor | None, dimensions: int, lengths: list[int]) -> Tensor | None:
    if tensor is not None:
        _require(tensor.ndim == dimensions and tensor.shape[0] == len(lengths), "queries or share")
    return tensor


def _store(
    tensors: dict[str, Tensor], prefix: str, lengths: list[int], device: torch.device
) -> LayerStore:
    length = tensors[prefix + "length"]
    names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    buffers = {name: tensors[prefix + name] for name in names if name != "length"}
    positions, heads = buffers["positions"], length.shape[-1]
    if length.dtype != torch.int64 or length.ndim != 2 or bool((length < 0).any()):
        raise ValueError(f"{prefix}length is no table of counts")
    if any(buffer.shape[0] != int(length.sum()) for buffer in buffers.values()):
        raise ValueError(f"{prefix}length does not match its entries")
    if length.shape[0] != len(lengths) or buffers["keys"].ndim != 2 or buffers["values"].ndim != 2:
        raise ValueError(
            f"{prefix}keys and values do not have the shape of {len(lengths)} prompts"
        )
    if any(buffer.ndim != 1 for name, buffer in buffers.items() if name not in _KV):
        raise ValueError(f"{prefix}columns are no columns")
    if positions.dtype != torch.int32 or not all(buffers[n].is_floating_point() for n in _KV):
        raise ValueError(f"{prefix}entries are of another kind of number")
    _require_positions(positions, length, lengths, prefix)
    _require(heads > 0, f"{prefix}length without heads")
    return LayerStore.pack({name: each.to(device) for name, each in buffers.items()}, length)


def _require_positions(positions: Tensor, length: Counts, lengths: list[int], prefix: str) -> None:
    """Ascending in every head, each once, and inside the prompt."""
    if not positions.numel():
        return
    first = starts_of(length).flatten()[length.flatten() > 0]
    rising = positions[1:] > positions[:-1]
    rising[first[1:] - 1] = True  # from one head's last to the next one's first
    last = torch.tensor(lengths)[:, None].expand_as(length).flatten()
    ends = torch.repeat_interleave(last, length.flatten())
    if not bool(rising.all()) or int(positions.min()) < 0 or bool((positions >= ends).any()):
        raise ValueError(f"{prefix}positions point outside of the prompt, or are out of order")
