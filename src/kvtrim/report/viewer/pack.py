"""Positions as text that a page can hold: runs of kept tokens, as short numbers, deflated, base64.

Kept tokens come in runs. First come the numbers of runs of all heads, then the gaps in front of
the runs, then their lengths, since gaps are like gaps and lengths like lengths. A number takes 7
bits a byte, the last byte of it has its top bit clear. Deflate then spends about as many bits on a
token as there is to say about it: one where every second is kept at random, less where fewer are,
or where neighbours stay together. What a smaller budget keeps is mostly a part of what the next
larger one keeps: then its places are counted among those, which takes as many bits again as the
larger one has tokens, not as the prompt has.
"""

import base64
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

_WIDEST = 5  # bytes of a number below 2^35


Heads = Sequence[np.ndarray]
"""Of each head the ascending numbers [entries] of the tokens that it keeps."""


def pack_runs(heads: Heads) -> dict[str, Any]:
    """The runs of several heads, and how many bytes are counts, gaps and lengths."""
    runs, none = [_runs(each) for each in heads], np.zeros(0, np.int64)
    counts = np.array([len(gaps) for gaps, _ in runs], np.int64)
    gaps, lengths = (np.concatenate([none, *(one[n] for one in runs)]) for n in (0, 1))
    parts = [_bytes(each) for each in (counts, gaps, lengths)]
    return {"packed": _deflate(b"".join(parts)), "sizes": [len(part) for part in parts]}


def places_within(heads: Heads, larger: Heads) -> list[np.ndarray] | None:
    """Where each head's tokens stand among those of another budget; None if some do not."""
    if len(heads) != len(larger):
        return None
    found = []
    for own, others in zip(heads, larger, strict=True):
        places = np.searchsorted(others, own)
        if len(own) and (places[-1] >= len(others) or (others[places] != own).any()):
            return None
        found.append(places)
    return found


def pack_numbers(numbers: Sequence[int] | np.ndarray) -> str:
    """Whole numbers from 0 on."""
    return _deflate(_bytes(np.asarray(numbers, np.int64)))


def _deflate(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content)).decode()


def _runs(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gaps and lengths of the runs of ascending numbers."""
    at = np.asarray(positions, np.int64)
    if not len(at):
        return at, at
    breaks = np.flatnonzero(np.diff(at) != 1) + 1
    starts = at[np.concatenate([[0], breaks])]
    ends = at[np.concatenate([breaks - 1, [len(at) - 1]])] + 1
    return starts - np.concatenate([[0], ends[:-1]]), ends - starts


def _bytes(numbers: np.ndarray) -> bytes:
    """Each number in as few bytes as hold it at 7 bits a byte, the lowest first."""
    size = np.ones(len(numbers), np.uint8)
    for digit in range(1, _WIDEST):
        size += numbers >= 1 << 7 * digit
    first = np.cumsum(size, dtype=np.int64) - size
    found = np.empty(int(size.sum(dtype=np.int64)), np.uint8)
    for digit in range(_WIDEST):
        which = np.flatnonzero(size > digit)
        part = (numbers[which] >> 7 * digit) & 127
        found[first[which] + digit] = part | np.where(size[which] > digit + 1, 128, 0)
    return found.tobytes()
