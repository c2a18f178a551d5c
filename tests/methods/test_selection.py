"""Scores and counts to slots: ties, forced entries, chunks, heads of different length."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from kvtrim.errors import UsageError
from kvtrim.methods import unit
from kvtrim.methods.selection import kept_from_mask, select
from kvtrim.methods.unit import Chunk, Token


def counts(*rows):
    return torch.tensor([rows])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_it_keeps_what_sorting_by_hand_keeps(data):
    heads, slots = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 25))
    sinks, recent = data.draw(st.integers(0, slots)), data.draw(st.integers(0, 6))
    recent = min(recent, slots - sinks)
    values = data.draw(st.lists(st.integers(0, 4), min_size=heads * slots, max_size=heads * slots))
    scores = torch.tensor(values, dtype=torch.float32).view(1, heads, slots)
    middle = slots - sinks - recent
    wanted = [data.draw(st.integers(0, middle)) for _ in range(heads)]
    kept = select(scores, counts(*wanted), slots, sinks=sinks, recent=recent)
    for head in range(heads):
        inside = oracles.top(scores[0, head, sinks : slots - recent].tolist(), wanted[head])
        want = [*range(sinks), *(i + sinks for i in inside), *range(slots - recent, slots)]
        assert kept.slots[0, head, : len(want)].tolist() == want
        assert int(kept.counts[0, head]) == len(want)
        assert kept.slots[0, head, len(want) :].eq(-1).all()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_heads_of_different_length_equal_each_head_alone(data):
    lengths = [data.draw(st.integers(3, 20)) for _ in range(3)]
    width, recent, sinks = max(lengths), 2, 1
    scores = torch.rand(1, 3, width)
    wanted = [data.draw(st.integers(0, length - 3)) for length in lengths]
    kept = select(scores, counts(*wanted), counts(*lengths), sinks=sinks, recent=recent)
    for head, length in enumerate(lengths):
        alone = select(
            scores[:, head : head + 1, :length],
            counts(wanted[head]),
            length,
            sinks=sinks,
            recent=recent,
        )
        got = kept.slots[0, head, : int(kept.counts[0, head])]
        assert got.tolist() == alone.slots[0, 0].tolist()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_best_are_those_of_the_lowest_ranks_however_they_are_found(data):
    width = data.draw(st.integers(0, 12))
    levels = st.sampled_from([-torch.inf, 0.0, 0.5, 1.0, torch.inf])
    values = data.draw(st.lists(levels, min_size=6 * width, max_size=6 * width))
    scores = torch.tensor(values).view(2, 3, width)
    wanted = [data.draw(st.integers(0, width + 2)) for _ in range(6)]
    wanted = torch.tensor(wanted).view(2, 3)
    assert torch.equal(unit.highest(scores, wanted), unit.ranks(scores) < wanted[..., None])
    if width:
        places = wanted.clamp(max=width - 1)
        found = [find(scores, places) for find in (unit.sorted_value, unit.selected_value)]
        assert torch.equal(*found)


def test_a_score_of_the_candidates_alone_is_enough():
    scores = torch.tensor([[[0.1, 0.9, 0.2]]])
    assert select(scores, counts(1), 5, recent=2).slots.tolist() == [[[1, 3, 4]]]


def test_ties_go_to_the_lower_slot():
    assert select(torch.ones(1, 1, 9), counts(3), 9).slots.tolist() == [[[0, 1, 2]]]


A = torch.tensor([[[5.0, 0, 0, 1, 2, 2, 2, 2, 0, 9, 0, 0, 3, 3]]])


def test_chunks_by_sum_and_by_mean():
    by_sum = select(A, counts(8), 14, unit=Chunk(chunk=4))
    assert by_sum.slots[0, 0].tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    by_mean = select(A, counts(8), 14, unit=Chunk(chunk=4, reduce="mean"))
    assert by_mean.slots[0, 0].tolist() == [8, 9, 10, 11, 12, 13]
    by_token = select(A, counts(8), 14, unit=Token())
    assert by_token.slots[0, 0].tolist() == [0, 4, 5, 6, 7, 9, 12, 13]


def test_left_over_entries_go_to_the_next_chunk_if_asked():
    kept = select(A, counts(10), 14, unit=Chunk(chunk=4, fill="partial"))
    assert kept.slots[0, 0].tolist() == [0, 1, 4, 5, 6, 7, 8, 9, 10, 11]


def test_a_head_without_room_for_a_chunk_falls_back_to_tokens():
    kept = select(A.expand(1, 2, 14), counts(3, 8), 14, unit=Chunk(chunk=4))
    assert kept.slots[0, 0, :3].tolist() == [0, 9, 12]
    assert kept.slots[0, 1].tolist() == [4, 5, 6, 7, 8, 9, 10, 11]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 30), st.integers(1, 9), st.data())
def test_chunks_of_one_are_tokens_and_runs_are_whole(width, size, data):
    scores = torch.rand(1, 2, width)
    wanted = counts(*(data.draw(st.integers(0, width)) for _ in range(2)))
    ones = select(scores, wanted, width, unit=Chunk(chunk=1))
    tokens = select(scores, wanted, width)
    assert torch.equal(ones.slots, tokens.slots)
    kept = select(scores, wanted, width, unit=Chunk(chunk=size))
    for head in range(2):
        count, found = int(wanted[0, head]), set(kept.slots[0, head].tolist()) - {-1}
        assert len(found) <= count
        if count >= size:
            assert len(found) > count - 2 * size  # the last run may be short
            for slot in found:
                start = slot // size * size
                assert set(range(start, min(start + size, width))) <= found


def test_shared_chunks_are_the_same_for_every_head():
    kept = select(torch.rand(1, 3, 20), counts(8, 8, 8), 20, unit=Chunk(chunk=4, shared=True))
    assert kept.slots[0, 0].tolist() == kept.slots[0, 1].tolist() == kept.slots[0, 2].tolist()


def test_a_chunk_without_tokens_is_refused():
    with pytest.raises(UsageError, match=r"chunk=0: expected int .1 or more"):
        Chunk(chunk=0)


def test_a_mask_becomes_slots():
    stay = torch.tensor([[[True, False, True], [False, False, True]]])
    kept = kept_from_mask(stay)
    assert kept.slots.tolist() == [[[0, 2], [2, -1]]]
    assert kept.counts.tolist() == [[2, 1]]
    assert not kept.uniform
