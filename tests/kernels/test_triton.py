"""The Triton kernels equal the slow loops: interpreted on a CPU, or for real on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtrim.errors import UsageError
from kvtrim.kernels import available, reference
from kvtrim.methods.policies import ops
from runs import flat_runs
from views import view

pytest.importorskip("triton", reason="Triton is not installed (pip install 'kvtrim[triton]')")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not available.is_interpreted():
    pytest.skip("no GPU, and TRITON_INTERPRET is not 1", allow_module_level=True)

from kvtrim.kernels import append, columns, split  # noqa: E402

CLOSE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
FORMATS = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),  # the interpreter does not know it
]


def runs(rows, kv_heads, lengths, width, dtype=torch.float32):
    keys, values, start, length = flat_runs(rows, kv_heads, lengths, width)
    return keys.to(DEVICE, dtype), values.to(DEVICE, dtype), start, length


def compare(queries, keys, values, start, length, softcap=None, size=64, bias=None):
    tiles = split.Tiles.of(length, queries.device, size)
    got = split.ragged(queries, keys, values, start, length, 0.2, softcap, tiles, bias).out
    exact = (x.double().cpu() for x in (queries, keys, values))
    added = None if bias is None else bias.cpu()
    want = reference.ragged(*exact, start, length, 0.2, softcap, added)
    close = CLOSE[queries.dtype]
    torch.testing.assert_close(got.double().cpu(), want, rtol=close, atol=close)


RAGGED = (  # prompts, query heads per KV head, queries, lengths, width, soft cap, biases
    (1, 1, 1, [0], 64, None, False),
    (1, 3, 2, [33, 7], 96, 5.0, True),
    (2, 4, 5, [70, 1], 64, None, True),
    (1, 1, 19, [70], 96, 5.0, False),
    (1, 1, 16, [33, 0], 64, None, True),
    (2, 8, 1, [7, 33], 64, 5.0, True),
    (2, 3, 1, [0, 1, 70, 7], 96, None, False),
    (1, 8, 5, [70], 64, None, False),
)
"""Few programs each: the interpreter takes some hundredths of a second for one."""


def ragged(rows, group, count, lengths, width, softcap, biased):
    kv_heads = len(lengths) // rows
    flat = runs(rows, kv_heads, lengths, width)
    queries = torch.randn(rows, kv_heads * group, count, width, device=DEVICE)
    bias = torch.randn(len(flat[0]), device=DEVICE) if biased else None
    compare(queries, *flat, softcap, bias=bias)


@pytest.mark.parametrize("case", RAGGED, ids=range(len(RAGGED)))
def test_ragged_attention_equals_the_reference(case):
    ragged(*case)


@pytest.mark.gpu
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_ragged_attention_of_any_size_equals_the_reference(data):
    draw = data.draw
    rows, kv_heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    group, count = draw(st.sampled_from([1, 3, 4, 8])), draw(st.sampled_from([1, 2, 5, 16, 19]))
    lengths = [draw(st.sampled_from([0, 1, 7, 33, 70])) for _ in range(rows * kv_heads)]
    width, softcap = draw(st.sampled_from([64, 96])), draw(st.sampled_from([None, 5.0]))
    ragged(rows, group, count, lengths, width, softcap, draw(st.booleans()))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("width", [64, 96, 128, 256])
def test_every_head_size_and_number_format(width, dtype):
    flat = runs(1, 2, [40, 9], width, dtype)
    compare(torch.randn(1, 6, 2, width).to(DEVICE, dtype), *flat)


def test_one_head_a_hundred_times_longer_than_the_others():
    flat = runs(1, 3, [700, 7, 7], 64)
    compare(torch.randn(1, 9, 1, 64, device=DEVICE), *flat)


def test_rows_of_different_lengths_and_empty_ones():
    flat = runs(3, 2, [0, 0, 1, 1, 90, 3], 64)
    compare(torch.randn(3, 8, 1, 64, device=DEVICE), *flat, size=32)


def test_values_of_another_width_than_keys():
    keys, _, start, length = runs(1, 2, [20, 31], 64)
    values = torch.randn(keys.shape[0], 32, device=DEVICE)
    compare(torch.randn(1, 4, 3, 64, device=DEVICE), keys, values, start, length)


def test_one_plan_serves_runs_that_grow():
    keys, values, start, length = runs(1, 2, [100, 64], 64)
    plan = split.Tiles.of(length, keys.device, 32)
    queries = torch.randn(1, 6, 1, 64, device=DEVICE)
    for less in (99, 40, 0):
        now = (length - less).clamp(min=0)
        got = split.ragged(queries, keys, values, start, now, 0.2, None, plan).out.cpu()
        want = reference.ragged(queries.cpu(), keys.cpu(), values.cpu(), start, now, 0.2)
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_tiles_cover_every_run_once():
    plan = split.Tiles.of(torch.tensor([[0, 1], [64, 65]]), torch.device("cpu"), 32)
    assert plan.first.tolist() == [0, 0, 1, 3, 6]
    assert plan.row.tolist() == [1, 2, 2, 3, 3, 3]
    assert split.Tiles.of(torch.tensor([[100_000]]), torch.device("cpu")).size == 256


COLUMNS = (  # slots, queries, query heads per KV head, own, weighed, lengths differ, soft cap
    (1, 1, 1, True, False, False, None),
    (40, 7, 3, False, True, True, 5.0),
    (90, 33, 1, True, True, True, None),
    (40, 40, 1, False, False, False, 5.0),
    (90, 1, 3, False, True, False, None),
    (150, 40, 1, True, False, True, 5.0),
)


def totals(slots, count, groups, own, weighed, differ, softcap):
    queries = torch.randn(2, 2 * groups, count, 64, device=DEVICE)
    keys = torch.randn(2, slots, 2, 64, device=DEVICE).transpose(1, 2)
    weights = torch.rand(2, count, device=DEVICE) if weighed else None
    less = torch.tensor([[0, 1], [2, 0]]).clamp(max=slots - count)
    lengths = slots - less if differ else None
    got = columns.sums(queries, keys, 0.2, softcap, lengths, weights, own)
    cpu = [x.cpu() for x in (queries, keys)]
    layer = view(
        *(x[0] for x in cpu),
        queries=cpu[0],
        keys=cpu[1],
        values=cpu[1],
        positions=torch.arange(slots).int().expand(2, 2, slots),
        scale=0.2,
        softcap=softcap,
        lengths=lengths,
    )
    want = ops.column_sums(layer, None if weights is None else weights.cpu(), own)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-5)
    got = columns.largest(queries, keys, 0.2, softcap, lengths, weights)
    want = ops.column_max(layer, None if weights is None else weights.cpu())
    torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", COLUMNS, ids=range(len(COLUMNS)))
def test_sums_and_maxima_of_columns_equal_those_of_the_whole_matrix(case):
    totals(*case)


@pytest.mark.gpu
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_sums_and_maxima_of_any_size_equal_those_of_the_whole_matrix(data):
    draw = data.draw
    slots = draw(st.sampled_from([1, 40, 90, 150]))
    count = min(slots, draw(st.sampled_from([1, 7, 33, 150])))
    own, weighed, differ = (draw(st.booleans()) for _ in range(3))
    softcap = draw(st.sampled_from([None, 5.0]))
    totals(slots, count, draw(st.sampled_from([1, 3])), own, weighed, differ, softcap)


@pytest.mark.parametrize("ragged", [False, True])
def test_window_votes_are_the_same_from_the_kernel(monkeypatch, ragged):
    queries, keys = torch.randn(6, 20, 64, device=DEVICE), torch.randn(2, 70, 64, device=DEVICE)
    layer = view(queries, keys, lengths=torch.tensor([[70, 41]]) if ragged else None)
    monkeypatch.setattr(ops, "_has_kernel", lambda layer: False)
    want = ops.window_sums(layer, 8), ops.column_sums(layer)
    monkeypatch.setattr(ops, "_has_kernel", lambda layer: True)
    got = ops.window_sums(layer, 8), ops.column_sums(layer)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_entries_are_added_behind_each_run():
    length = torch.tensor([[3, 0], [5, 1]], device=DEVICE)
    start = torch.tensor([[0, 8], [16, 24]], device=DEVICE)
    buffers = {
        "keys": torch.zeros(32, 6, device=DEVICE),
        "values": torch.zeros(32, 4, device=DEVICE),
        "positions": torch.full((32,), -1, dtype=torch.int32, device=DEVICE),
    }
    keys = torch.randn(2, 3, 2, 6, device=DEVICE).transpose(1, 2)
    values = torch.randn(2, 2, 3, 4, device=DEVICE)
    positions = torch.tensor([[7, 8, 9], [20, 21, 22]], device=DEVICE)
    append.append(buffers, start, length + 3, keys, values, positions)
    for b in range(2):
        for h in range(2):
            at = int(start[b, h] + length[b, h])
            run = slice(at, at + 3)
            assert torch.equal(buffers["keys"][run], keys[b, h])
            assert torch.equal(buffers["values"][run], values[b, h])
            assert torch.equal(buffers["positions"][run].cpu(), positions[b].int().cpu())
    assert int((buffers["positions"] == -1).sum()) == 32 - 12


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UsageError, match="needs a CUDA device"):
        available.require_triton(torch.device("cpu"))


@pytest.mark.process
def test_the_kernels_compile_for_a_gpu():
    """Triton's own compiler takes them, down to machine code for an H100; no GPU is needed."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compiling.py")
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [
        "tile",
        "tile",
        "merge",
        "normalisers",
        "columns",
        "columns",
        "append",
    ]
