"""Caches filled with random entries hold what they say, and decoding goes on behind them."""

import pytest
import torch

import models
from kvtrim.bench.speed import random_entries
from kvtrim.bench.speed.clock import time_steps
from models import is_attached


@pytest.fixture(scope="module")
def model():
    return models.tiny("llama", dtype=torch.float32)


def test_heads_hold_a_fifth_to_nine_fifths_of_the_mean():
    lengths = random_entries.spread(1000, rows=2, heads=8, layer=1)
    assert lengths.sum(dim=1).tolist() == [8000, 8000]
    assert int(lengths.min()) == 200 and 1795 < int(lengths.max()) < 1810
    assert lengths[0].tolist() != lengths[1].tolist()
    assert random_entries.spread(1000, 1, 8, 2)[0].tolist() == lengths[1].tolist()


@pytest.mark.parametrize("per_head", [False, True])
def test_steps_follow_what_was_filled_in(model, per_head):
    with random_entries.ours(model, 2, 20, per_head, capture=False) as subject, torch.no_grad():
        before = subject.figures()
        assert before["entries"] == 20
        assert before["held_bytes"] == 3 * 2 * 2 * 20 * (2 * 8 * 4 + 4)
        found = time_steps(model, subject, torch.full((2, 1), 9), 3)
        after = subject.figures()
        assert found["captured"] is False and found["median_step_s"] > 0
        assert after["entries"] == 23
    assert not is_attached(model)


def test_transformers_own_cache_is_filled_alike(model):
    with random_entries.theirs(model, 2, 20) as subject, torch.no_grad():
        assert subject.figures()["held_bytes"] == 3 * 2 * 2 * 20 * 2 * 8 * 4
        time_steps(model, subject, torch.full((2, 1), 9), 3)
        assert subject.figures()["entries"] == 23
