"""Named documents on disk: found again, never lost, never another model's."""

import dataclasses
import os
import threading
from contextlib import suppress

import pytest
import torch

import kvtrim
import models
from kvtrim import files
from kvtrim.errors import CacheError, FileError, KvtrimError, UnknownNameError, UsageError
from kvtrim.methods.request import Request
from kvtrim.serve import documents
from kvtrim.serve.library import Library

TEXT = "The cat sat on the mat and looked at the wide blue sea. " * 4
HOW = documents.How(Request.of("snapkv", "32", {"window": 8}))


@pytest.fixture(scope="module")
def cat():
    return Reader(models.tiny("llama", dtype=torch.float32), models.tokenizer(), "cat")


class Reader:
    def __init__(self, model, tokenizer, label):
        self.prints = documents.Prints.of(label, model, tokenizer)
        self.given = model, tokenizer, self.prints

    def add(self, library, name, text=TEXT, how=HOW):
        return documents.add(library, name, *self.given, text, how)

    def load(self, library, name):
        return documents.load(library, name, *self.given)


@pytest.fixture
def library(tmp_path):
    return Library(tmp_path / "library")


def test_a_document_is_what_was_compressed(library, cat):
    entry, read = cat.add(library, "manual")
    assert read and library.text(entry) == TEXT and entry.method == "snapkv"
    model, tokenizer, _ = cat.given
    fresh = kvtrim.compress(model, tokenizer, TEXT, method="snapkv", keep=32, window=8)
    _, loaded = cat.load(library, "manual")
    answers = [
        kvtrim.generate(model, tokenizer, cache, "Where?", max_new_tokens=6).answers[0]
        for cache in (fresh, loaded)
    ]
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[1].reused_tokens == entry.tokens == loaded.seen


def test_the_same_is_found_again_and_anything_else_is_read(library, cat):
    first, _ = cat.add(library, "manual")
    again, read = cat.add(library, "manual")
    assert not read and again.key == first.key
    twin, read = cat.add(library, "twin")
    assert not read and twin.key == first.key
    library.remove("manual")
    assert cat.load(library, "twin")[0].key == first.key  # the files stay with their last name
    changes = [
        dict(text=TEXT + "x"),
        dict(how=documents.How(Request.of("snapkv", "40", {"window": 8}))),
        dict(how=documents.How(Request.of("adakv", "32", {"window": 8}))),
        dict(how=documents.How(Request.of("snapkv", "32", {"window": 4}))),
        dict(how=dataclasses.replace(HOW, chat=False)),
        dict(text=kvtrim.Document(TEXT, {"shots": [(0, 40)]})),
    ]
    keys = {first.key}
    for change in changes:
        entry, read = cat.add(library, "other", **change)
        assert read and entry.key not in keys
        keys.add(entry.key)
    left = {path.stem for path in (library.folder / "caches").iterdir()}
    assert left == {first.key, entry.key}  # what a new document replaces is removed


def test_a_damaged_cache_is_named_and_read_again(library, cat):
    entry, _ = cat.add(library, "manual")
    path = library.cache_path(entry)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4] + b"\0\1\2\3")
    assert "altered" in documents.verify(library, entry)
    with pytest.raises(CacheError, match="altered"):
        cat.load(library, "manual")
    _, read = cat.add(library, "manual")
    assert read and documents.verify(library, entry) is None
    (library.folder / "texts" / f"{entry.key}.txt").write_text("else")
    assert "altered" in documents.verify(library, entry)


def test_other_models_documents_are_named_and_never_loaded(library, cat, monkeypatch):
    cat.add(library, "manual")
    dog = Reader(models.tiny("llama", seed=1, dtype=torch.float32), models.tokenizer(), "dog")
    monkeypatch.setattr(documents, "load_cache", None)
    with pytest.raises(CacheError, match=r"@manual was read by another model \(cat\), not by dog"):
        dog.load(library, "manual")
    plain = Reader(cat.given[0], models.tokenizer(chat=False), "cat")
    with pytest.raises(CacheError, match="another tokenizer"):
        plain.load(library, "manual")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "/a", "a\0", "-a", "é", "a" * 65])
def test_names_are_no_paths(library, cat, name):
    cat.add(library, "manual")
    for act in (
        lambda: library.get(name),
        lambda: library.rename("manual", name),
        lambda: library.remove(name),
        lambda: cat.add(library, name),
    ):
        with pytest.raises(UsageError, match="is no name"):
            act()
    assert sorted(os.listdir(library.folder)) == [".lock", "caches", "names", "texts"]


def test_names_are_told_apart_and_missing_ones_are_named(library, cat):
    with pytest.raises(UsageError, match=r"library .* is empty"):
        library.get("manual")
    cat.add(library, "manual")
    with pytest.raises(UnknownNameError, match="did you mean 'manual'"):
        library.get("manaul")
    with pytest.raises(UsageError, match="upper and lower case"):
        cat.add(library, "Manual")
    cat.add(library, "other")
    with pytest.raises(UsageError, match="already"):
        library.rename("other", "manual")
    assert library.rename("other", "third").name == "third"
    assert {each.name for each in library.entries()[0]} == {"manual", "third"}


def test_the_least_used_is_pruned_first(library, cat):
    for number, name in enumerate(("a", "b", "c")):
        entry, _ = cat.add(library, name, TEXT + name)
        os.utime(library.folder / "names" / f"{name}.json", (number, number))
    library.use(library.get("a"))
    removed = library.prune(2 * entry.file_bytes + 100)
    assert [each.name for each in removed] == ["b"]
    assert [each.name for each in library.entries()[0]] == ["a", "c"]
    assert [each.name for each in library.prune(0)] == ["c", "a"]
    assert not any((library.folder / "caches").iterdir())


def test_what_another_process_removes_meanwhile_is_no_damage(library, cat, monkeypatch):
    for name in ("a", "b", "c"):
        cat.add(library, name, TEXT + name)
    another, read, gone = Library(library.folder), files.record_of, []

    def record_of(path):
        if path.stem == "b" and not gone:
            gone.append(path)
            another.remove("b")
        return read(path)

    for look in (
        lambda: library.entries(),
        lambda: library.get("b"),
        lambda: library.remove("b"),
    ):
        cat.add(library, "b", TEXT + "b")
        gone.clear()
        with monkeypatch.context() as patched:
            patched.setattr(files, "record_of", record_of)
            try:
                look()
            except UnknownNameError as error:
                assert "'b'" in str(error)
        assert library.entries()[1] == []


def test_pruning_and_removing_at_once(library, cat):
    for number in range(6):
        cat.add(library, f"d{number}", TEXT[:60] + str(number))
    said, listing, met = [], library.entries, threading.Barrier(3)

    def entries():
        found = listing()
        with suppress(threading.BrokenBarrierError):
            met.wait(0.2)  # all have the same listing, if they can
        return found

    def prune():
        own = Library(library.folder)
        own.entries = entries
        try:
            said.append(own.prune(0))
        except KvtrimError as error:
            said.append(error)

    threads = [threading.Thread(target=prune) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(isinstance(each, list) for each in said), said
    assert sorted(e.name for each in said for e in each) == [f"d{n}" for n in range(6)]


class Killed(BaseException):
    pass


def test_whoever_is_killed_while_writing_loses_nothing(library, cat, monkeypatch):
    """At every step of replacing a document, either the old or the new one is whole."""
    old, _ = cat.add(library, "manual")
    entry, _ = cat.add(library, "next", TEXT + "x")
    library.remove("next")
    steps = ["cache_path", "_write", "_sweep"]
    for step in steps:

        def die(*given):
            raise Killed

        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(library, step, die)
            cat.add(library, "manual", TEXT + "x")
        left, damaged = library.entries()
        assert not damaged and len(left) == 1 and documents.verify(library, left[0]) is None
        assert left[0].key == (entry.key if step == "_sweep" else old.key)


def test_a_damaged_record_hides_no_other(library, cat):
    cat.add(library, "manual")
    names = library.folder / "names"
    for content in ("", "[]", "{}", '{"format": 1, "key": "../../x"}'):
        (names / "bad.json").write_text(content)
        left, damaged = library.entries()
        assert [each.name for each in left] == ["manual"] and "bad.json" in damaged[0]
        with pytest.raises(FileError, match=r"bad\.json"):
            library.get("bad")
    cat.add(library, "other", TEXT + "x")
    assert cat.load(library, "manual")


def test_several_writers_at_once(library, cat):
    failed = []

    def work(number):
        try:
            for turn in range(3):
                cat.add(library, f"d{number}", f"{TEXT}{number}{turn}")
        except KvtrimError as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    left, damaged = library.entries()
    assert not failed and not damaged and len(left) == 3
    assert all(documents.verify(library, each) is None for each in left)


def test_what_another_process_replaced_is_not_taken_for_what_was_asked(library, cat):
    from kvtrim.serve.reader import Reader as Serving

    asked, _ = cat.add(library, "manual")
    other, _ = cat.add(Library(library.folder), "manual", TEXT[:60])
    model, tokenizer, prints = cat.given
    serving = Serving(model, tokenizer, prints, library)
    with pytest.raises(CacheError):  # its file is gone; the other's entries are not its own
        serving.load(asked)
    assert serving.load(other).key == other.key != asked.key


def test_a_name_is_never_given_to_what_another_process_removed(library, cat, monkeypatch):
    cat.add(library, "manual")
    found, another = documents.find, Library(library.folder)

    def find(*given):
        entry = found(*given)
        if entry is not None and entry.name == "manual":
            another.remove("manual")
        return entry

    monkeypatch.setattr(documents, "find", find)
    # its files were sound when they were looked at
    monkeypatch.setattr(documents, "verify", lambda *given: None)
    twin, read = cat.add(library, "twin")
    assert read and library.cache_path(twin).is_file() and cat.load(library, "twin")[0] == twin
