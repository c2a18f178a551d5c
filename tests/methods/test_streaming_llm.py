"""StreamingLLM: worked examples, the bounded stream, and the recorded figures of every preset."""

import pytest
import torch

import golden
import kvtrim
from kvtrim.engine.layer import Call
from kvtrim.engine.session import Session
from kvtrim.errors import BudgetError, UsageError
from kvtrim.methods.keep import Keep
from kvtrim.methods.settings import find

D = 4


class Stream:
    """One layer, one KV head, fed with keys and a rotation that writes down what it was asked."""

    def __init__(self, rotate="noted", keep=8, heads=1, **settings):
        self.session = Session(find("streaming-llm", **settings), Keep.parse(keep), layers=1)
        self.asked, self.heads = {}, heads
        self.rotate = self.note if rotate == "noted" else rotate

    def note(self, keys, by):
        """Keys hold their own position in the first dimension."""
        self.asked |= dict(zip(keys[:, 0].int().tolist(), by.tolist(), strict=True))
        return keys

    def read(self, count):
        start = self.session.state.reading.seen
        keys = torch.zeros(1, self.heads, count, D)
        keys[..., 0] = torch.arange(start, start + count)
        self.asked = {}
        self.session.begin(1, count)
        self.session.attend(0, Call(keys, keys, keys, 1.0, rotate=self.rotate))
        self.session.end()
        return self.positions

    @property
    def positions(self):
        return self.session.state.layers[0].store.dense()[0]["positions"][0, 0].tolist()

    def acting(self):
        """Where each held key acted in the last pass, the newest query at its own slot."""
        held = self.positions
        newest = self.session.state.reading.seen - 1
        return [p + self.asked.get(p, 0) - newest + len(held) - 1 for p in held]


def test_twenty_tokens_with_a_budget_of_eight():
    stream = Stream(preset="upstream")
    assert stream.read(20) == [0, 1, 2, 3, 16, 17, 18, 19]
    assert stream.read(1) == [0, 1, 2, 3, 17, 18, 19, 20]


def test_rolled_positions_are_the_slot_numbers_and_original_ones_are_left_alone():
    stream = Stream(preset="upstream")
    stream.read(20)
    assert stream.asked == {}, "a prompt is read where it stands"
    stream.read(1)
    assert stream.acting() == list(range(8))
    assert stream.asked == {0: 13, 1: 13, 2: 13, 3: 13}, "only keys before the gap move"
    original = Stream(preset="bounded", rotate=None)
    original.read(20)
    assert original.read(1) == [0, 1, 2, 3, 17, 18, 19, 20]


def test_a_block_of_three_tokens_leaves_one_recent_slot():
    stream = Stream(preset="upstream")
    stream.read(20)
    assert stream.read(3) == [0, 1, 2, 3, 19, 20, 21, 22]
    assert stream.acting() == list(range(8))


def test_a_block_larger_than_the_recent_part_keeps_the_sinks_and_is_cut_back_later():
    stream = Stream(preset="upstream")
    stream.read(20)
    assert stream.read(6) == [0, 1, 2, 3, *range(20, 26)]
    assert stream.acting() == list(range(10))
    assert stream.read(1) == [0, 1, 2, 3, 23, 24, 25, 26]


@pytest.mark.parametrize("preset", ["upstream", "bounded"])
def test_sinks_survive_hundreds_of_steps_and_the_size_stays(preset):
    stream = Stream(preset=preset)
    stream.read(1)  # a stream needs no prompt: the cache fills up token by token
    for step in range(1, 301):
        held = stream.read(1)
        assert len(held) == min(step + 1, 8)
        assert held[:4] == list(range(min(step + 1, 4)))
        assert held[4:] == list(range(max(4, step - 3), step + 1))
        if preset == "upstream":
            assert stream.acting() == list(range(len(held)))


def test_a_budget_that_leaves_no_recent_token_is_refused():
    for preset in ("upstream", "kvf"):
        with pytest.raises(BudgetError, match="Use keep=5 or more"):
            Stream(preset=preset, keep=4)


def test_a_key_that_must_move_needs_a_rotation():
    q = torch.randn(1, 20, D, generator=torch.Generator().manual_seed(0))
    kept = kvtrim.select("streaming-llm", q, q, q, keep=8, preset="upstream")
    assert kept[0][0].tolist() == [0, 1, 2, 3, 16, 17, 18, 19]
    stream = Stream(preset="upstream", rotate=None)
    stream.read(20)
    with pytest.raises(UsageError, match=r"pass Call\(rotate=...\), or set positions='original'"):
        stream.read(1)


def test_cutting_ahead_is_refused_where_scores_come_from_queries():
    with pytest.raises(UsageError, match="SnapKV scores by queries; leave ahead=False"):
        Session(find("snapkv", every=1, ahead=True), Keep.parse(64), layers=1)


@pytest.mark.parametrize("preset", ["upstream", "bounded", "kvf", "fastkv", "kvpress"])
@pytest.mark.parametrize("case", golden.cases("streamingllm"), ids=lambda case: case.id)
def test_every_preset_keeps_what_the_public_code_kept(case, preset):
    params = case.params
    settings = {"preset": preset, "sinks": params["sink"]}
    (layer,) = kvtrim.select("streaming-llm", *case.qkv(), keep=params["capacity"], **settings)
    assert not case.differing_heads(layer)
