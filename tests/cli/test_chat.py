"""A conversation as a user types it."""

import io
import re
import sys
from typing import ClassVar

import pytest

import kvtrim
import models

DOCUMENT = "The cat sat on the mat and looked at the wide blue sea. " * 3
SHORT = ("--method", "snapkv", "--keep", "48", "--max-new-tokens", "5")


@pytest.fixture
def chat(monkeypatch, invoke, tmp_path, model_folder):
    """Type lines into a chat; gives (exit code, standard output, standard error)."""
    monkeypatch.setenv("KVTRIM_LIBRARY", str(tmp_path / "library"))
    (tmp_path / "doc.txt").write_text(DOCUMENT)

    def call(*lines, options=("doc.txt", *SHORT), stdin=io.StringIO):
        monkeypatch.setattr(sys, "stdin", stdin("".join(f"{line}\n" for line in lines)))
        code, out, err = invoke("chat", *options, "--model", model_folder)
        return code, out, " ".join(err.split())

    return call


def test_answers_are_those_of_generate_and_turns_read_what_is_new(chat, model_folder):
    code, out, err = chat("Who?", "/held", "Why?", "/held")
    model, tokenizer = kvtrim.load(model_folder)
    cache = kvtrim.compress(model, tokenizer, DOCUMENT, method="snapkv", keep=48)
    alone = kvtrim.generate(model, tokenizer, cache, "Who?", max_new_tokens=5)
    assert code == 0 and f"{cache.seen} document tokens read" in err
    assert "".join(out.split()).startswith("".join(alone.text.split()))
    reused = [int(n.replace(",", "")) for n in re.findall(r"read, ([\d,]+) reused", out)]
    assert reused[0] == cache.seen and reused[1] > cache.seen + 10


def test_what_is_undone_was_never_said(chat):
    _, plain, _ = chat("Why?")
    code, out, _ = chat("Who?", "/undo", "Why?")
    assert code == 0 and out.endswith(plain)
    _, _, err = chat("/undo")
    assert "nothing to undo" in err


def test_a_document_is_saved_and_asked_again_without_reading(chat):
    _, plain, _ = chat("Who?")
    code, out, _ = chat("/save manual")
    assert code == 0 and "@manual" in out
    code, out, err = chat("Who?", "/save again", options=("@manual", "--max-new-tokens", "5"))
    assert code == 0 and out.startswith(plain) and re.search(r"0 of \d+ document tokens", err)
    code, out, _ = chat("Who?", options=("@again", "--max-new-tokens", "5"))
    assert out == plain


def test_budget_and_method_change_and_turns_go_on(chat):
    code, out, err = chat("Who?", "/keep 64", "/method adakv", "/held", "Why?", "/quit", "Who?")
    assert code == 0 and "adakv 64" in out and err.count("document tokens read") == 3
    _, _, err = chat("/keep", "/keep -3", "/method nobody", "/sing", "/held")
    assert all(
        each in err for each in ("/keep what?", "keep", "unknown method", "no command /sing")
    )


def test_turns_are_trimmed_by_a_schedule(chat):
    long = "Tell me more about the cat and the sea and the mat. " * 2
    held = []
    for settings in ((), ("--set", "every=16", "--set", "window=8")):
        options = ("doc.txt", *SHORT, *settings)
        _, out, _ = chat(long, long, "/held", options=options)
        held.append(float(re.search(r"all: ([\d.]+) KiB", out)[1]))
    assert held[1] < held[0] / 2


def test_without_a_document_it_talks_about_nothing(chat):
    code, out, err = chat("Who?", "/held", "/save x", "/keep 5", options=("--max-new-tokens", "4"))
    assert code == 0 and out and "no document to save" in err and "no document to read" in err


def test_an_interrupt_stops_the_answer_alone(chat, monkeypatch):
    from kvtrim.serve.sampler import Sampler

    choose, times = Sampler.choose, []

    def once(*given):
        times.append(0)
        if len(times) == 3:
            raise KeyboardInterrupt
        return choose(*given)

    monkeypatch.setattr(Sampler, "choose", once)
    code, out, _ = chat("Who?", "Why?", "/held")
    assert code == 0 and "all:" in out and len(times) > 5


@pytest.mark.parametrize("method", ["snapkv", "h2o"])
@pytest.mark.parametrize("layer", [1, 11])  # of 3 in each pass
def test_an_interrupt_within_a_pass_leaves_a_conversation(chat, monkeypatch, method, layer):
    from kvtrim.hf.pack import Pack
    from kvtrim.serve.sampler import Sampler

    attend, choose, times = Pack.attend, Sampler.choose, []
    (letter,) = models.tokenizer()("a", add_special_tokens=False).input_ids

    def once(*given):
        times.append(0)
        if len(times) == layer:
            raise KeyboardInterrupt
        return attend(*given)

    def say(*given):  # until then, what is the same tokens in the next question's prompt
        return (letter, None, ()) if len(times) < layer else choose(*given)

    options = ("doc.txt", "--method", method, *SHORT[2:])
    _, plain, _ = chat("Why?", options=options)
    with monkeypatch.context() as patched:
        patched.setattr(Pack, "attend", once)
        patched.setattr(Sampler, "choose", say)
        code, out, err = chat("Who?", "Why not?", "/undo", "/undo", "Why?", options=options)
    assert code == 0 and out.endswith(plain) and len(out.splitlines()) == 3
    assert "interrupted" not in err
    assert ("taken back" in out) == ("nothing to undo" in err) == (layer == 1)


def test_a_question_without_an_answer_was_never_said(chat, monkeypatch):
    from kvtrim.serve.stream import Stops

    _, plain, _ = chat("Why?")
    texts = iter(["", "", " ", "", "", "\n"])
    with monkeypatch.context() as patched:
        add = Stops.add
        patched.setattr(Stops, "add", lambda *given: next(texts, add(*given)))
        code, out, err = chat("Who?", "/undo", "Why?")
    assert code == 0 and out.startswith("(an empty answer") and "nothing to undo" in err
    assert "taken back" in out and out.endswith(plain)


def test_what_was_settled_is_refused_again(chat):
    chat("/save manual")
    for given in (("--keep", "12"), ("--method", "knorm"), ("--set", "window=4")):
        code, _, err = chat("Who?", options=("@manual", *given))
        assert code == 2 and f"{given[0]} was settled when @manual was compressed" in err


OWN = """
from kvtrim.methods.method import Method
from kvtrim.methods.policies.knorm import KNorm

OWN = Method(KNorm())
"""


def test_a_method_of_ones_own_is_named_to_talk_about_what_it_made(chat, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # a command adds the current folder
    (tmp_path / "mine.py").write_text(OWN)
    own, short = ("--method", "mine:OWN"), ("--max-new-tokens", "5")
    made = ("doc.txt", *own, "--keep", "48", *short)
    code, plain, _ = chat("Who?", "/save manual", options=made)
    assert code == 0
    code, _, err = chat("Who?", options=("@manual", *short))
    assert code == 1 and "mine:OWN" in err
    code, out, _ = chat("Who?", "/keep 40", "/held", options=("@manual", *own, *short))
    assert code == 0 and plain.startswith(out.splitlines()[0]) and "mine:OWN 40" in out
    record = next((tmp_path / "library" / "names").iterdir())
    record.write_text(record.read_text().replace("mine:OWN", "evil:x"))
    code, _, err = chat("Who?", options=("@manual", *own, *short))
    assert code == 0, err  # a record never decides what is imported
    sys.modules.pop("mine")


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Typist:
    """A prompt at which nobody types; what it was made with."""

    made: ClassVar[list] = []

    def __init__(self, history):
        self.made.append(history)

    def prompt(self, _):
        raise EOFError


@pytest.mark.parametrize("closed", [None, "kvtrim", "kvtrim/chat_history"])
def test_a_history_lies_in_the_data_folder_or_nowhere(chat, monkeypatch, tmp_path, closed):
    import prompt_toolkit
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    data = tmp_path / "data"
    monkeypatch.setenv("XDG_DATA_HOME", str(data))
    monkeypatch.setattr(prompt_toolkit, "PromptSession", Typist)
    (data / "kvtrim").mkdir(parents=True)
    if closed == "kvtrim":
        (data / "kvtrim").rmdir()
        (data / "kvtrim").touch()
    elif closed:
        (data / closed).mkdir()
    code, *_ = chat(stdin=Terminal)
    history = Typist.made.pop()
    assert code == 0 and not (tmp_path / "chat_history").exists()
    if closed is None:
        assert isinstance(history, FileHistory)
        assert history.filename == str(data / "kvtrim" / "chat_history")
    else:
        assert isinstance(history, InMemoryHistory)
