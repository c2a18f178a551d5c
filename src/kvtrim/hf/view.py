"""What a cache kept of its prompt, to look at: `kvtrim.view`."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from kvtrim.cache import archive as archives
from kvtrim.errors import CacheFileError, UsageError
from kvtrim.hf.cache import Cache
from kvtrim.hf.models.load import TOKENIZERS
from kvtrim.prompts.detokenizer import pieces
from kvtrim.prompts.spans import have_question
from kvtrim.report.viewer import evidence as places
from kvtrim.report.viewer.exhibit import Exhibit, Said, Stop
from kvtrim.types import Int, Tensor

ABOUT = {
    "question-agnostic": "Question-agnostic: the document was cut before any question was known.",
    "question-aware": "Question-aware: document and question were read together, and then cut.",
}


def view(
    cache: Cache | Sequence[Cache],
    tokenizer: Any = None,
    *,
    evidence: str | Sequence[str] = (),
    question: str | None = None,
    said: str | None = None,
    row: int = 0,
) -> Exhibit:
    """What a cache kept of its prompt, as a page: a notebook shows it, `.save(path)` writes it.

    The text is shaded by the share of heads that keep each token, of all layers, one layer or one
    head. Made of the positions in the store; nothing is read or computed by the model.

    Args:
        cache: one that has read a prompt, or several that have read the same one, with other
            budgets (a slider) or methods (side by side).
        tokenizer: of its model; may be left out for a model that `kvtrim.load` loaded.
        evidence: texts of the prompt that an answer needs; where they are lost is marked. With an
            answer and no evidence it is the answer's own words, where the prompt has them.
        question, said: a question that was asked, and what the first cache answered.
        row: which prompt of a batch.

    Raises:
        UsageError: nothing was read yet, other prompts, evidence that is not in the prompt, no
            tokenizer, or no such row.
    """
    caches = [cache] if isinstance(cache, Cache) else list(cache)
    if not caches:
        raise UsageError("there is no cache to look at; pass one, or a list of them")
    alone = [_of_row(each, row) for each in caches]
    ids = [token_ids(each) for each in alone]
    if any(each != ids[0] for each in ids):
        raise UsageError("these caches have read different prompts; look at each by itself")
    shown = pieces(_tokenizer(caches[0], tokenizer), ids[0])
    texts = [evidence] if isinstance(evidence, str) else list(evidence)
    found = places.find(shown, texts)
    if said and not texts:
        found = places.find_answer(shown, said, question or "")
    stops = [stop_of(each) for each in alone]
    if said is not None:
        stops[0] = replace(stops[0], said=Said(said))
    spans = alone[0].session.state.spans
    aware = have_question(spans[:1])
    about = [ABOUT["question-aware" if aware else "question-agnostic"]] if spans else []
    return Exhibit(
        shown,
        stops,
        [*about, *name_rest(alone[0])],
        alone[0].managed,
        question,
        evidence=found,
    )


def view_file(
    path: str | os.PathLike[str], tokenizer: Any, layers: Sequence[int], stop: Stop
) -> Exhibit:
    """What a saved cache of one document kept, with none of its keys and values loaded.

    Args:
        layers: the model's numbers of those that do not slide.
        stop: what is known of it; its positions are read from the file.

    Raises:
        CacheFileError: it is no cache file, or holds positions that no cache has.
    """
    archive = archives.open_archive(path)
    parts = [[f"layers.{n}.{x}" for x in ("positions", "length")] for n in range(len(layers))]
    found = archive.read_some(["token_ids", *(name for pair in parts for name in pair)])
    try:
        ids = found["token_ids"][0].tolist()
        held = [_heads(found[at], found[length], len(ids)) for at, length in parts]
        made = replace(stop, positions=held)
        return Exhibit(pieces(tokenizer, ids), [made], [ABOUT["question-agnostic"]], layers)
    except (IndexError, OverflowError, RuntimeError, TypeError, ValueError, UsageError) as error:
        raise CacheFileError(f"{path} holds what no cache does: {error}") from None


def _heads(numbers: Int[Tensor, " T"], counts: Int[Tensor, "1 K"], end: int) -> list[np.ndarray]:
    """Positions of one layer, head by head. Raises ValueError if they cannot be."""
    ends = counts[0].cumsum(0).tolist()
    if numbers.ndim != 1 or min(counts[0].tolist(), default=0) < 0 or ends[-1] != len(numbers):
        raise ValueError("positions without heads")
    found = np.split(numbers.numpy(), ends[:-1])
    if not all(_ascend(head, end) for head in found):
        raise ValueError("positions that do not ascend")
    return found


def _ascend(numbers: np.ndarray, end: int) -> bool:
    """Whether they are places of so many tokens, each once."""
    if not len(numbers):
        return True
    return bool(numbers[0] >= 0 and numbers[-1] < end and (np.diff(numbers) > 0).all())


def stop_of(cache: Cache, said: Said | None = None) -> Stop:
    """What the cache of one prompt holds now."""
    return Stop(
        cache.request.name,
        "all" if cache.method.full else str(cache.keep),
        positions(cache),
        cache.held_bytes,
        cache.full_bytes,
        cache.remark,
        said,
    )


def positions(cache: Cache) -> list[list[np.ndarray]]:
    """`[layer][head]`: the numbers [entries] of the tokens that each head of one prompt keeps,
    ascending; of the layers that do not slide.
    """
    found = []
    for held in cache.session.state.layers:
        if held.store is None:
            found.append([])
            continue
        numbers = held.store.buffers["positions"].flatten().cpu().numpy()
        runs = zip(held.store.start[0].tolist(), held.store.length[0].tolist(), strict=True)
        found.append([numbers[first : first + count].copy() for first, count in runs])
    return found


def token_ids(cache: Cache) -> list[int]:
    """What was read of one prompt, padding left out.

    Raises:
        UsageError: nothing was, or no tokens.
    """
    if not cache.seen or cache.session.under_way:
        raise UsageError("this cache has read no prompt, or a pass over it was interrupted")
    if cache.token_ids is None:
        raise UsageError("this cache has read embeddings, which are no text; feed token ids")
    ids, real = cache.token_ids[0].cpu(), cache.session.state.reading.real
    return (ids if real is None else ids[real[0]]).tolist()


def name_rest(cache: Cache) -> list[str]:
    """What is said of a model some of whose layers slide; nothing of others."""
    rest = sorted({*range(len(cache.layers))} - {*cache.managed})
    if not rest:
        return []
    numbers = ", ".join(map(str, rest))
    return [
        f"Not shown: layers {numbers}, which slide and hold the newest tokens of their window."
    ]


def _of_row(cache: Cache, row: int) -> Cache:
    rows = len(cache.lengths)
    if rows <= 1:
        return cache
    if not 0 <= row < rows:
        raise UsageError(f"this cache has {rows} prompts; row is a number from 0 to {rows - 1}")
    one = cache.copy()
    one.batch_select_indices(torch.tensor([row]))
    return one


def _tokenizer(cache: Cache, given: Any) -> Any:
    known = given if given is not None or cache.model is None else TOKENIZERS.get(cache.model)
    if known is None:
        raise UsageError("kvtrim did not load this model itself: pass its tokenizer as well")
    return known
