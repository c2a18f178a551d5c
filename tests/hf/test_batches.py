"""A prompt keeps in any batch what it keeps alone, whatever stands beside it."""

import pytest
import torch

import kvtrim
import models
from kvtrim.methods.budgets.per_head import PerHead
from kvtrim.methods.policies.circuitkv import CircuitKV
from kvtrim.methods.selection import select
from kvtrim.methods.unit import Chunk
from kvtrim.types import LayerView, Room


def feed(model, cache, parts):
    """Read (ids, mask) one after the other, as transformers' callers do."""
    real = torch.zeros(len(parts[0][0]), 0, dtype=torch.long)
    with torch.no_grad(), kvtrim.attach(model):
        for ids, mask in parts:
            real = torch.cat([real, mask], dim=1)
            where = (real.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            model(ids, attention_mask=real, position_ids=where, past_key_values=cache)


def row(parts, number):
    """One prompt of them, without its padding."""
    own = [(ids[number : number + 1], mask[number].bool()) for ids, mask in parts]
    return [
        (ids[:, real], torch.ones(1, int(real.sum())).long()) for ids, real in own if real.any()
    ]


def padded(lengths, seed=0):
    ids = models.prompt(max(lengths), seed=seed, rows=len(lengths))
    return ids, (
        torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    ).long()


TURNS = [padded((40, 31, 40)), padded((6, 1, 3), 1), padded((1, 1, 1), 2), padded((0, 3, 2), 3)]
TURNS += [padded((1, 0, 1), 4), padded((1, 1, 1), 5), padded((2, 2, 2), 6)]
EVICTING = {
    "knorm": {"every": 7},
    "streaming-llm": {"every": 3, "ahead": True},
    "shotkv": {"run": 4},
    "snapkv": {"every": 2, "region": "generated", "share": 0.5, "window": 4},
    "pyramidinfer": {
        "region": "blocks",
        "every": 2,
        "share": 0.5,
        "newest": 0.05,
        "decay": 0.4,
        "min_context": 4,
    },
    "adakv": {"every": 4, "preset": "kvf-kv"},
    "ada-curdkv": {"every": 3},
    "circuitkv": {"budget": "per-head", "every": 1, "window": 4},
    "cake": {"window": 4},
    "lava": {"every": 2, "window": 4},
    "h2o": {},
    "chunkkv": {"budget": "per-head", "every": 3, "preset": "kvpress", "window": 4, "chunk": 4},
}


@pytest.mark.parametrize("keep", [20, 0.5])
@pytest.mark.parametrize("name", EVICTING)
def test_padding_in_later_turns_changes_nothing(llama, name, keep):
    batch = kvtrim.Cache(llama, name, keep, **EVICTING[name])
    feed(llama, batch, TURNS)
    for number in range(3):
        alone = kvtrim.Cache(llama, name, keep, **EVICTING[name])
        feed(llama, alone, row(TURNS, number))
        assert models.positions(batch, number) == models.positions(alone), number


@pytest.mark.parametrize("name", ["gemfilter", "fastkv"])
def test_the_last_column_is_the_last_token_where_some_prompts_fit_and_others_do_not(llama, name):
    """`generate` takes its logits, whichever tokens a propagation chose."""
    settings = {"propagation.tokens": 6, "window": 4} if name == "fastkv" else {"tokens": 6}
    for seed in range(4):
        ids, mask = padded((40, 30, 38), seed)
        with torch.no_grad(), kvtrim.attach(llama):
            batch = kvtrim.Cache(llama, name, 32, **settings)
            ends = llama(ids, attention_mask=mask, past_key_values=batch).logits[:, -1]
            for number, real in enumerate(mask.bool()):
                alone = kvtrim.Cache(llama, name, 32, **settings)
                end = llama(ids[number : number + 1, real], past_key_values=alone).logits[0, -1]
                assert (ends[number] - end).abs().max() < 1e-4, (seed, number)


@pytest.mark.parametrize("name", EVICTING)
def test_rows_take_along_what_is_remembered_of_them(llama, name):
    """As beams do: queries, counters and numbers of entries move with their prompt."""
    ids, more = models.prompt(40, rows=2), models.prompt(9, seed=1, rows=2)
    batch, *alone = (kvtrim.Cache(llama, name, 20, **EVICTING[name]) for _ in range(3))
    with torch.no_grad(), kvtrim.attach(llama):
        for row, own in enumerate(alone):
            for part in (ids, *more.split(1, dim=1)):
                llama(part[row : row + 1], past_key_values=own)
        llama(ids, past_key_values=batch)
        order = [0, 1]
        for at, part in enumerate(more.split(1, dim=1)):
            if at % 2:
                batch.batch_select_indices(torch.tensor([1, 0]))
                order.reverse()
            llama(part[order], past_key_values=batch)
    for place, row in enumerate(order):
        assert models.positions(batch, place) == models.positions(alone[row])


@pytest.mark.parametrize("name", ["knorm", "shotkv", "adakv", "snapkv"])
def test_prompts_that_came_to_one_length_are_not_taken_for_alike(llama, name):
    """One had less of a budget, another schedule, an answer that began elsewhere."""
    parts = [padded((40, 34)), padded((0, 6), 1), *(padded((1, 1), at) for at in range(2, 9))]
    batch = kvtrim.Cache(llama, name, 0.5, **EVICTING[name])
    feed(llama, batch, parts)
    for number in range(2):
        alone = kvtrim.Cache(llama, name, 0.5, **EVICTING[name])
        feed(llama, alone, row(parts, number))
        assert models.positions(batch, number) == models.positions(alone), number


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text"])
def test_a_probe_beside_a_longer_one_leaves_windows_that_slide_their_room(architecture):
    model = models.tiny(architecture)
    parts = [padded((41, 50)), padded((1, 1), 1)]
    batch = kvtrim.Cache(model, "kvzip", 24)
    feed(model, batch, parts)
    for number in range(2):
        alone = kvtrim.Cache(model, "kvzip", 24)
        feed(model, alone, row(parts, number))
        assert models.positions(batch, number) == models.positions(alone)


def test_slots_that_a_head_does_not_have_weigh_nothing():
    """Normalised scores of heads of unequal length are those of each head's own slots."""
    draw = torch.Generator().manual_seed(0)
    scores = torch.rand(1, 2, 12, generator=draw)
    scores[0, 1, 5:] = -torch.inf
    room = Room(0, 1, 2, keep=6, asked=6.0, protected=0, tokens=40)
    for rule in ({"normalize": True, "floor": 0.0}, {"rule": "floor", "floor": 1.0}):
        counts = PerHead(**rule).counts(room, scores)
        assert counts[0, 1] <= 5
        if "normalize" in rule:
            top = scores[0].sort(descending=True).values[:, :6].clamp(min=0)
            whole = scores[0].clamp(min=0).sum(dim=1, keepdim=True)
            weighed = scores[0] * top.sum(dim=1, keepdim=True) / whole
            best = weighed.flatten().sort(descending=True).indices[:12] // 12
            assert counts[0].tolist() == [int((best == head).sum()) for head in (0, 1)]


def test_a_walk_is_shared_by_heads_of_one_length_whatever_the_other_prompts_hold():
    draw = torch.Generator().manual_seed(0)
    queries, keys = (
        torch.randn(2, 4, 4, 8, generator=draw),
        torch.randn(2, 2, 20, 8, generator=draw),
    )
    lengths = torch.tensor([[20, 20], [20, 14]])

    def scores(rows, lengths):
        own = keys[rows]
        positions = torch.arange(20, dtype=torch.int32).expand(*own.shape[:3])
        layer = LayerView(0, 1, 10, 20, queries[rows], own, own, positions, 1.0, lengths=lengths)
        return CircuitKV(window=4).score(layer)

    together = scores(slice(0, 2), lengths)
    torch.testing.assert_close(together[:1], scores(slice(0, 1), None))
    torch.testing.assert_close(together[1:], scores(slice(1, 2), lengths[1:]))


def test_a_window_that_competes_is_each_heads_own():
    scores, lengths = torch.ones(1, 2, 16), torch.tensor([[20, 12]])
    scores[0, 1, 8:12] = 0
    unit = Chunk(chunk=4, window_competes=True)
    kept = select(scores, torch.tensor([[4, 4]]), lengths, recent=4, unit=unit)
    assert set(range(16, 20)) <= set(kept.slots[0, 0].tolist())
    assert set(range(8, 12)) <= set(kept.slots[0, 1].tolist())


def test_a_short_heads_last_run_may_win():
    scores = torch.zeros(1, 2, 12)
    scores[0, 1, 4:6] = 9
    kept = select(scores, torch.tensor([[4, 4]]), torch.tensor([[12, 6]]), unit=Chunk(chunk=4))
    assert kept.slots[0, 1][kept.slots[0, 1] >= 0].tolist() == [4, 5]
