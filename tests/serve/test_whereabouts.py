"""Requests go to a replica that holds what they are about, and to none that let go of it."""

import pytest

pytest.importorskip("ray.serve.request_router", reason="pip install 'kvtrim[replicas]'")
from kvtrim.engine.branch import Base
from kvtrim.serve.memory import Document, Memory
from kvtrim.serve.whereabouts import Whereabouts

ALL = ["a", "b", "c"]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def where(clock):
    where = Whereabouts(clock)
    where.note_holdings({"a": {"x", "y"}, "b": {"y"}, "c": {"y", "z", "w"}})
    return where


def test_holders_come_first_then_who_holds_least(where):
    assert where.ranks("x", ALL) == [["a"], ["b"], ["c"]]
    assert where.ranks("y", ALL) == [ALL]
    assert where.ranks("new", ALL) == [["b"], ["a", "c"]]
    assert where.ranks("x", ["b", "c"]) == [["b"], ["c"]]  # it has died
    assert Whereabouts().ranks("x", ALL) == [ALL]


def test_who_let_go_of_it_is_no_holder(where):
    where.note_request("x", "a")  # which said before that it holds it
    where.note_holdings({"a": {"y"}, "b": {"y"}, "c": set()})
    assert where.ranks("x", ALL) == [["c"], ["a", "b"]]


def test_who_was_sent_it_holds_it_until_its_own_word_is_there(where, clock):
    where.note_request("new", "c")
    where.note_request("newer", "b")
    where.note_request("newest", "b")
    assert where.ranks("new", ALL) == [["c"], ["a"], ["b"]]
    where.note_holdings({"a": set(), "b": set(), "c": {"new"}})
    assert where.ranks("new", ALL)[0] == ["c"]
    where.note_holdings({"a": set(), "b": set(), "c": set()})
    assert where.ranks("new", ALL) == [["a", "c"], ["b"]]
    assert where.ranks("newer", ALL)[0] == ["b"]
    clock.now = 60.0  # nothing came of it
    assert where.ranks("newer", ALL) == [ALL]


def test_memory_says_as_what_it_was_asked():
    memory = Memory(100)
    first, second = (Document(key, object.__new__(Base), 1, 50, 50) for key in "pq")
    for document in (first, second):
        memory.add(document)
    first.note_subject("manual")
    first.note_subject("")
    second.note_subject("brief")
    first.note_subject("its other name")
    assert memory.subjects() == {"manual", "brief", "its other name"}
    assert memory.known_as("manual") == {"p"}
    assert memory.make_room(10) and memory.subjects() == {"brief"}
    for number in range(40):  # whoever asks by ever new names
        second.note_subject(str(number))
    assert len(memory.subjects()) == 16 and "39" in memory.subjects()
