"""One pass over a prompt for all that an analysis wants to see: views of layers, attention.

What is kept of a prompt grows with its length; attention is made of some queries at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from kvtrim.bench.analyses.base import Asked, Subject
from kvtrim.bench.candidates import Candidate
from kvtrim.hf.cache import Cache
from kvtrim.hf.models.architectures import layout
from kvtrim.hf.replay import Recording, record
from kvtrim.prompts import repeat_words
from kvtrim.types import Bool, Float, Int, LayerView, Tensor

_ELEMENTS = 2**21  # weights of a block


@dataclass(frozen=True)
class Pass:
    """A prompt, or its context where the question comes later, read once with a full cache."""

    subject: Subject
    recording: Recording
    layers: list[int]  # the model's own numbers of the layers that kvtrim manages
    question: list[int]  # token ids that were left for later

    @property
    def tokens(self) -> int:
        """How many were read."""
        return self.recording.ids.shape[1]

    def view(self, index: int) -> LayerView:
        """A layer with everything that it holds, and all queries of the prompt."""
        call = self.recording.calls[index]
        return LayerView(
            index=index,
            layers=len(self.recording.calls),
            keep=self.tokens,
            tokens=self.tokens,
            queries=call.queries,
            keys=call.keys,
            values=call.values,
            positions=torch.arange(self.tokens).expand(*call.keys.shape[:2], -1),
            scale=call.scale,
            softcap=call.softcap,
            hidden=call.hidden,
            output=call.output,
            factor=call.factor,
            rotate=call.rotate,
        )

    @cached_property
    def views(self) -> list[LayerView]:
        """Every layer; they share the recording's tensors."""
        return [self.view(index) for index in range(len(self.recording.calls))]

    def cache(self, cell: Candidate) -> Cache:
        """The cache of a method after what was read. Errors as of `Recording.cache`."""
        return self.recording.cache(cell.request)


def passes(asked: Asked, hidden: bool = False) -> Iterator[Pass]:
    """Every prompt read once, one after the other; only one of them is held.

    Args:
        hidden: keep what the layers' attention received, for methods that read it.
    """
    layers = layout(asked.model, True).managed
    for number, subject in enumerate(asked.subjects):
        asked.report(f"reading {subject.name}", number, len(asked.subjects))
        ids, spans, question = subject.given.read_first(asked.aware)
        words = repeat_words(asked.tokenizer, subject.given.frame)
        given = torch.tensor([ids], device=asked.model.device)
        recorded = record(asked.model, given, spans, words, hidden=hidden)
        yield Pass(subject, recorded, layers, question)


def blocks(
    view: LayerView, rows: Int[Tensor, " R"]
) -> Iterator[tuple[Tensor, Float[Tensor, "H r n"], Float[Tensor, "H r n"]]]:
    """Some queries of a prompt at a time: their numbers, logits and weights over all slots.

    Logits are scaled and capped as the model's; slots behind a query's own have -inf and 0.
    """
    queries, keys = _exact(view.queries[0]), _exact(view.keys[0])
    kv_heads, slots = keys.shape[0], keys.shape[1]
    slot, turned = torch.arange(slots, device=keys.device), keys.transpose(-1, -2)
    for part in rows.to(keys.device).split(max(1, _ELEMENTS // (len(queries) * slots))):
        packed = (queries[:, part] * view.scale).reshape(kv_heads, -1, keys.shape[-1])
        logits = (packed @ turned).view(len(queries), len(part), slots)
        if view.softcap is not None:
            logits = view.softcap * torch.tanh(logits / view.softcap)
        logits = logits.masked_fill(slot > part[:, None], -torch.inf)
        yield part, logits, logits.softmax(dim=-1)


def newest(view: LayerView, window: int) -> Int[Tensor, " R"]:
    """The numbers of the last queries."""
    count = view.queries.shape[2]
    return torch.arange(max(0, count - window), count)


def evenly(view: LayerView, most: int) -> Int[Tensor, " R"]:
    """At most so many queries, evenly from the first to the last."""
    count = view.queries.shape[2]
    return torch.linspace(0, count - 1, min(most, count)).round().long()


def window_weights(view: LayerView, window: int) -> Float[Tensor, "H W n"]:
    """Attention of the last queries over all slots."""
    return torch.cat([weights for *_, weights in blocks(view, newest(view, window))], dim=1)


def values(view: LayerView) -> Float[Tensor, "K n E"]:
    """The values of the one prompt, fp32 or better."""
    return _exact(view.values[0])


def _exact(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def kept_slots(cache: Cache) -> list[Bool[Tensor, "X n"]]:
    """Which tokens of the prompt each layer's stored heads hold; X is K, or H in some presets."""
    found = []
    for held in cache.session.state.layers:
        if held.store is None:
            continue
        store, mask = held.store, torch.zeros(held.heads, cache.seen, dtype=torch.bool)
        runs = zip(store.start[0].tolist(), store.length[0].tolist(), strict=True)
        positions = store.buffers["positions"].long().cpu()
        for head, (first, count) in enumerate(runs):
            mask[head, positions[first : first + count]] = True
        found.append(mask)
    return found


def ranks(numbers: Float[Tensor, "*B N"]) -> Float[Tensor, "*B N"]:
    """The place of each number among the others, in ascending order; equals share their mean."""
    less = torch.searchsorted(numbers.sort(dim=-1).values, numbers.contiguous())
    upto = torch.searchsorted(numbers.sort(dim=-1).values, numbers.contiguous(), right=True)
    return (less + upto - 1).double() / 2


def spearman(one: Float[Tensor, "*B N"], other: Float[Tensor, "*B N"]) -> Float[Tensor, "*B"]:
    """Correlation of the places; 0 where one of them does not vary."""
    first, second = (ranks(x) - (x.shape[-1] - 1) / 2 for x in (one, other))
    scale = (first.square().sum(dim=-1) * second.square().sum(dim=-1)).sqrt()
    return (first * second).sum(dim=-1) / scale.clamp(min=1e-300)


def sample(count: int, most: int, seed: int) -> Int[Tensor, " N"]:
    """At most so many of the numbers below `count`, drawn by a seed, for pictures of points."""
    if count <= most:
        return torch.arange(count)
    draw = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=draw)[:most].sort().values


def mean_over(rows: Sequence[Sequence[float]]) -> list[float]:
    """The mean of each column."""
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]
