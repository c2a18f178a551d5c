"""The ragged store against plain Python lists, under random sequences of its operations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtrim.cache.store import LEAST_SLACK, MOST_SLACK, LayerStore, slack
from kvtrim.methods.selection import kept_from_mask

D = 3


class Lists:
    """The obvious store: for each prompt and head a list of (key, value, position, column)."""

    def __init__(self, rows, heads):
        self.heads = [[[] for _ in range(heads)] for _ in range(rows)]

    def lengths(self):
        return [[len(head) for head in row] for row in self.heads]


class Pair:
    """A store and its list twin, changed together."""

    def __init__(self, rows, heads):
        self.store = LayerStore.empty(
            torch.zeros(rows, heads, 0, D), torch.zeros(rows, heads, 0, D)
        )
        self.lists = Lists(rows, heads)
        self.next = 0

    def fresh(self, rows, heads, count):
        size = rows * heads * count
        numbers = torch.arange(self.next, self.next + size, dtype=torch.float32)
        self.next += size
        keys = numbers.view(rows, heads, count, 1).expand(-1, -1, -1, D)
        return {"keys": keys, "values": -keys}

    def append(self, count):
        rows, heads = self.store.length.shape
        new = self.fresh(rows, heads, count)
        where = torch.tensor([max(map(len, row)) for row in self.lists.heads])
        positions = where[:, None] + torch.arange(count)
        self.store.append({**new, "positions": positions[:, None].int()})
        for b in range(rows):
            for h in range(heads):
                for i in range(count):
                    number = float(new["keys"][b, h, i, 0])
                    self.lists.heads[b][h].append((number, -number, int(positions[b, i])))

    def append_row(self, row, count):
        heads = self.store.length.shape[1]
        new = self.fresh(1, heads, count)
        first = max(map(len, self.lists.heads[row]))
        positions = torch.arange(first, first + count).int()[None, None]
        self.store.append_row(row, {**new, "positions": positions})
        for h in range(heads):
            for i in range(count):
                number = float(new["keys"][0, h, i, 0])
                self.lists.heads[row][h].append((number, -number, first + i))

    def retain(self, draw):
        lengths = self.store.length
        width = max(1, int(lengths.max()))
        stay = torch.zeros(*lengths.shape, width, dtype=torch.bool)
        for b, row in enumerate(self.lists.heads):
            for h, head in enumerate(row):
                flags = draw(st.lists(st.booleans(), min_size=len(head), max_size=len(head)))
                stay[b, h, : len(head)] = torch.tensor(flags, dtype=torch.bool)
                row[h] = [entry for entry, flag in zip(head, flags, strict=True) if flag]
        self.store.retain(kept_from_mask(stay))

    def select(self, rows):
        self.store = self.store.select_rows(torch.tensor(rows))
        self.lists.heads = [[list(head) for head in self.lists.heads[row]] for row in rows]

    def cut_back(self, drop):
        length = (self.store.length - drop).clamp(min=0)
        self.store.cut_back(length)
        for b, row in enumerate(self.lists.heads):
            for h, head in enumerate(row):
                row[h] = head[: int(length[b, h])]

    def check(self):
        store = self.store
        assert store.length.tolist() == self.lists.lengths()
        assert bool((store.length <= store.capacity).all())
        starts, ends = store.start.flatten(), (store.start + store.capacity).flatten()
        order = starts.argsort(stable=True)
        assert bool((ends[order][:-1] <= starts[order][1:]).all()), "runs overlap"
        for b, row in enumerate(self.lists.heads):
            for h, head in enumerate(row):
                run = slice(int(store.start[b, h]), int(store.start[b, h]) + len(head))
                found = zip(
                    store.keys[run, 0].tolist(),
                    store.values[run, 0].tolist(),
                    store.buffers["positions"][run].tolist(),
                    strict=True,
                )
                assert list(found) == head
        if store.length.max() > 0:
            self.check_dense()

    def check_dense(self):
        dense, lengths = self.store.dense()
        assert (lengths is None) == (self.store.width is not None)
        for b, row in enumerate(self.lists.heads):
            for h, head in enumerate(row):
                assert dense["keys"][b, h, : len(head), 0].tolist() == [entry[0] for entry in head]
            if self.store.row(b).length.max() > 0:
                own, _ = self.store.row(b).dense()
                for h, head in enumerate(row):
                    assert own["keys"][0, h, : len(head), 0].tolist() == [
                        entry[0] for entry in head
                    ]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_it_does_what_lists_do(data):
    pair = Pair(data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)))
    pair.append(data.draw(st.integers(1, 30)))
    pair.check()
    for _ in range(data.draw(st.integers(1, 8))):
        rows = pair.store.length.shape[0]
        action = data.draw(st.sampled_from(["append", "row", "retain", "select", "copy", "cut"]))
        if action == "append":
            pair.append(data.draw(st.integers(1, 40)))
        elif action == "row":
            pair.append_row(data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, 9)))
        elif action == "retain":
            pair.retain(data.draw)
        elif action == "select":
            pair.select(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=4)))
        elif action == "copy":
            old, pair.store = pair.store, pair.store.copy()
            old.keys.fill_(-99)
        else:
            pair.cut_back(data.draw(st.integers(0, 5)))
        pair.check()


@given(st.integers(1, 400), st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_slack_is_bounded(length, steps):
    store = LayerStore.empty(torch.zeros(1, 2, 0, D), torch.zeros(1, 2, 0, D))
    zeros = torch.zeros(1, 2, length, D)
    store.append({"keys": zeros, "values": zeros, "positions": torch.zeros(1, 1, length).int()})
    assert store.nbytes == 2 * length * (2 * D * 4 + 4), "a prompt is stored without slack"
    for _ in range(steps):
        one = torch.zeros(1, 2, 1, D)
        store.append({"keys": one, "values": one, "positions": torch.zeros(1, 1, 1).int()})
    slack = (store.capacity - store.length).max()
    assert slack <= max(LEAST_SLACK, min(MOST_SLACK, (length + steps) // 16 + 1))


@given(st.integers(1, 400), st.integers(0, 399))
@settings(max_examples=60, deadline=None)
def test_room_behind_a_store_that_is_cut_back_is_given_back(length, stays):
    stays = min(stays, length)
    store = LayerStore.empty(torch.zeros(1, 2, 0, D), torch.zeros(1, 2, 0, D))
    zeros = torch.zeros(1, 2, length, D)
    store.append({"keys": zeros, "values": zeros, "positions": torch.zeros(1, 1, length).int()})
    store.cut_back(torch.full((1, 2), stays))
    assert int(store.capacity.max()) <= stays + int(slack(torch.full((1, 2), stays)).max())
    assert store.nbytes == int(store.capacity.sum()) * (2 * D * 4 + 4)


@pytest.mark.parametrize("ragged", [False, True])
def test_appending_moves_an_amount_that_does_not_grow_with_the_length(ragged, monkeypatch):
    """Entries are copied only when a head is full, a bounded number of times."""
    moved = {}
    original = LayerStore._move

    def counting(self, capacity):
        moved["entries"] = moved.get("entries", 0) + int(self.length.sum())
        original(self, capacity)

    monkeypatch.setattr(LayerStore, "_move", counting)
    per_step = []
    for length in (256, 1024, 4096):
        store = LayerStore.empty(torch.zeros(1, 2, 0, D), torch.zeros(1, 2, 0, D))
        zeros = torch.zeros(1, 2, length, D)
        store.append(
            {"keys": zeros, "values": zeros, "positions": torch.zeros(1, 1, length).int()}
        )
        if ragged:
            stay = torch.ones(1, 2, length, dtype=torch.bool)
            stay[0, 1, 5] = False
            store.retain(kept_from_mask(stay))
        moved.clear()
        for _ in range(512):
            one = torch.zeros(1, 2, 1, D)
            store.append({"keys": one, "values": one, "positions": torch.zeros(1, 1, 1).int()})
        per_step.append(moved["entries"] / 512 / 2)
    assert max(per_step) < 40, per_step  # entries copied per entry appended, whatever the length


def test_a_borrowed_prompt_is_cut_without_a_copy_of_it():
    keys = torch.arange(24.0).view(1, 2, 4, 3).transpose(2, 3).contiguous().transpose(2, 3)
    positions = torch.arange(4).int().expand(1, 1, 4)
    store = LayerStore.borrow({"keys": keys, "values": keys + 1, "positions": positions})
    assert store.nbytes == 0
    assert store.dense()[0]["keys"].data_ptr() == keys.data_ptr()
    stay = torch.tensor([[[True, False, True, True], [False, False, False, True]]])
    store.retain(kept_from_mask(stay))
    store.settle()
    assert store.length.tolist() == [[3, 1]]
    assert torch.equal(store.keys, torch.cat([keys[0, 0, [0, 2, 3]], keys[0, 1, [3]]]))
    assert store.nbytes == 4 * (2 * 3 * 4 + 4)


def test_a_borrowed_prompt_of_which_all_stays_is_copied():
    keys = torch.randn(1, 2, 4, 3)
    store = LayerStore.borrow(
        {"keys": keys, "values": keys, "positions": torch.arange(4).int().expand(1, 1, 4)}
    )
    store.settle()
    keys.zero_()
    assert float(store.keys.abs().sum()) > 0
    assert store.width == 4


def test_columns_follow_their_entries():
    store = LayerStore.empty(torch.zeros(1, 2, 0, D), torch.zeros(1, 2, 0, D))
    zeros = torch.zeros(1, 2, 5, D)
    store.append({"keys": zeros, "values": zeros, "positions": torch.arange(5).int()[None, None]})
    store.add_column("carried")
    store.set_column("carried", torch.arange(10.0).view(1, 2, 5))
    stay = torch.tensor([[[True, False, True, False, True], [False, True, False, False, False]]])
    store.retain(kept_from_mask(stay))
    one = torch.zeros(1, 2, 1, D)
    store.append({"keys": one, "values": one, "positions": torch.full((1, 1, 1), 5).int()})
    dense, _ = store.dense()
    assert dense["carried"][0, 0].tolist() == [0, 2, 4, 0]
    assert dense["carried"][0, 1, :2].tolist() == [6, 0]
    store.set_column("carried", torch.full((1, 2, 4), 7.0))
    assert store.dense()[0]["carried"][0, 1, :2].tolist() == [7, 7]
    store.drop_column("carried")
    assert "carried" not in store.buffers


def test_forgetting_from_a_position():
    store = LayerStore.empty(torch.zeros(2, 1, 0, D), torch.zeros(2, 1, 0, D))
    zeros = torch.zeros(2, 1, 6, D)
    store.append(
        {"keys": zeros, "values": zeros, "positions": torch.arange(6).int().expand(2, 1, 6)}
    )
    store.forget_from([4, 2])
    assert store.length.tolist() == [[4], [2]]
