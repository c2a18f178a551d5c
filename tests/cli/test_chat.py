"""A conversation as a user types it."""

import io
import re
import sys

import pytest

import kvtrim

DOCUMENT = "The cat sat on the mat and looked at the wide blue sea. " * 3
SHORT = ("--method", "snapkv", "--keep", "48", "--max-new-tokens", "5")


@pytest.fixture
def chat(monkeypatch, invoke, tmp_path, model_folder):
    """Type lines into a chat; gives (exit code, standard output, standard error)."""
    monkeypatch.setenv("KVTRIM_LIBRARY", str(tmp_path / "library"))
    (tmp_path / "doc.txt").write_text(DOCUMENT)

    def call(*lines, options=("doc.txt", *SHORT)):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
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
