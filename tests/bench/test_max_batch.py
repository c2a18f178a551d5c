"""The search for the largest batch: its order, what counts as fitting, resuming."""

import json

import pytest
import torch

import models
from kvtrim.bench.candidates import candidates
from kvtrim.bench.speed import max_batch
from kvtrim.bench.speed.max_batch import Search, next_batch, search
from kvtrim.errors import UsageError
from kvtrim.records.journal import Journal
from kvtrim.report.max_batch import page, rows, table


def tried_until_known(limit, most):
    tried = {}
    while (batch := next_batch(tried, most)) is not None:
        assert batch not in tried and 1 <= batch <= most
        tried[batch] = batch <= limit
    return max((batch for batch, fits in tried.items() if fits), default=0), len(tried)


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 100, 1000])
def test_the_search_ends_at_the_largest_that_fits(limit):
    found, tries = tried_until_known(limit, most=500)
    assert found == min(limit, 500)
    assert tries <= 2 * 10


@pytest.fixture(scope="module")
def model():
    return models.tiny("llama", dtype=torch.float32)


@pytest.fixture
def counted(monkeypatch):
    """Bytes as held figures tell them: resident memory of tiny caches is noise."""
    monkeypatch.setattr(
        max_batch, "_peak_bytes", lambda weights, alone, batch, *peaks: alone * batch
    )


def searched(model, plan, journal=None):
    journal = Journal() if journal is None else journal
    search(model, plan, candidates(["full", "knorm"], ["16"]), journal)
    return rows(journal.lines), journal


def test_a_smaller_cache_lets_more_prompts_in(model, counted):
    plan = Search((64,), memory=50_000, new_tokens=2)
    found, journal = searched(model, plan)
    by_name = {row["method"]: row for row in found}
    each = 3 * 2 * 64 * 2 * 8 * 4  # layers, KV heads, tokens, K and V, width, bytes
    assert by_name["transformers"]["batch"] == 50_000 // each
    assert by_name["knorm"]["batch"] > 3 * by_name["transformers"]["batch"]
    assert by_name["knorm"]["batch_ratio"] > 3
    assert by_name["knorm"]["tokens_per_s"] > 0
    again, _ = searched(model, plan, journal)
    assert again == found
    record = {"model": {"name": "m", "dtype": "d"}, "plan": {"memory": 50_000}}
    record["machine"] = {"device": "cpu", "threads": 1}
    assert "| knorm | 16 |" in page(record, found)
    json.dumps(found)


def test_a_memory_that_not_even_one_prompt_fits_into(model, counted):
    found, _ = searched(model, Search((64,), memory=10, new_tokens=2))
    assert [row["batch"] for row in found] == [0, 0, 0]
    assert table(found).rows[0][3] == "none"


def test_memory_is_the_larger_of_decoding_and_of_the_last_prompt_read_beside_the_others():
    assert max_batch._peak_bytes(100, 10, 5, reading=70, decoding=60) == 100 + 4 * 10 + 70
    assert max_batch._peak_bytes(100, 10, 5, reading=70, decoding=900) == 1000
    with pytest.raises(UsageError, match="CUDA and on Linux"):
        max_batch._peak_bytes(100, 10, 5, None, 900)
