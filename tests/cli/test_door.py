"""The command line's door: one line for every error, and what flags may stand together."""

import sys

import pytest

from kvtrim import cli
from kvtrim.cli import options


@pytest.fixture(autouse=True)
def path(monkeypatch):
    """A command adds the current folder to it."""
    monkeypatch.setattr(sys, "path", [*sys.path])


TELL = ("recommend", "--prompts", "doc.txt", "--method", "knorm")
ASK = ("ask", "doc.txt", "-q", "?", "--keep", "64", "--max-new-tokens", "2")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (TypeError("a bug\nof two lines"), "TypeError: a bug of two lines (test_door.py:"),
        (KeyError("x"), "KeyError: 'x' ("),
        (OSError(28, "No space left on device", "runs/x"), "No space left on device: runs/x"),
        (PermissionError(13, "Permission denied", "a"), "Permission denied: a"),
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate"), "out of memory"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates"), "UnicodeEncodeError"),
        (RecursionError("too deep"), "RecursionError: too deep"),
    ],
)
def test_no_error_of_another_library_leaves_raw(run, monkeypatch, error, said):
    def fail(*_):
        raise error

    monkeypatch.setattr(options, "read_questions", fail)
    code, out, err = run(*ASK)
    assert code == 1 and out == ""
    assert said in err and err.startswith("kvtrim: ") and err.count("\n") == 1, err
    for place in ((*ASK, "--debug"), ("--debug", *ASK)):
        code, out, err = run(*place)
        assert code == 1 and "Traceback" in err and err.splitlines()[-1].startswith("kvtrim: ")


def test_a_reader_who_has_enough_is_no_error(run, monkeypatch):
    def fail(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(options, "read_questions", fail)
    monkeypatch.setattr(cli.os, "dup2", lambda *_: None)
    code, out, err = run(*ASK)
    assert code in (1, cli.EXIT_PIPE) and (out, err) == ("", "")


def test_no_command_prints_the_help(run):
    code, out, _ = run(model=False)
    assert code == 0 and "ask" in out and "compress" in out and "--debug" in out


def test_a_question_may_be_the_word_of_a_flag(run):
    code, _, err = run("--debug", "methods", "--", "--debug", model=False)
    assert code == 2 and "unknown method '--debug'" in err


METHOD = """
from dataclasses import dataclass
import kvtrim
from kvtrim.methods.policies.base import Policy

@dataclass(frozen=True)
class Mine(Policy):
    def lookback(self): return 0
    def score(self, layer): return {score}

MINE = kvtrim.Method(Mine())
"""


@pytest.mark.parametrize(
    ("score", "said"),
    [
        ("layer.values.float().norm(dim=-1)", ""),
        ("layer.values.float().norm(dim=-1) * float('nan')", "Mine.score gave NaN"),
        ("layer.values.float().norm(dim=-1)[..., 1:]", "Mine.score gave shape"),
        ("layer.nothing", "AttributeError: 'LayerView' object has no attribute 'nothing'"),
    ],
)
def test_a_method_in_the_current_folder_is_found_and_its_faults_named(
    run, tmp_path, monkeypatch, score, said
):
    name = f"own_{abs(hash(score))}"
    (tmp_path / f"{name}.py").write_text(METHOD.format(score=score))
    code, _, err = run(*ASK, "--method", f"{name}:MINE")
    assert said in err and (code == 0) == (not said), err
    if "AttributeError" in said:
        assert f"{name}.py:9" in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (METHOD.replace("    def lookback(self): return 0\n", ""), "lookback"),
        (METHOD.replace("@dataclass(frozen=True)\n", ""), "Mine is no frozen dataclass"),
        ("import kvtrim\nMINE = 1 / 0\n", "ZeroDivisionError"),
        ("this is no Python\n", "SyntaxError"),
    ],
)
def test_a_module_that_cannot_be_loaded_is_one_line(run, tmp_path, text, said):
    name = f"broken_{abs(hash(text))}"
    (tmp_path / f"{name}.py").write_text(text.replace("{score}", "None"))
    code, _, err = run("methods", f"{name}:MINE", model=False)
    assert code == 2 and said in err and f"{name}:MINE" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "flags",
    [
        ("--method", "h2o"),
        ("--keep", "40"),
        ("--set", "window=3"),
        ("--protocol", "question-aware"),
        ("--no-chat",),
        ("--system", "You are a pirate."),
        ("--truncate", "middle"),
        ("--shots-separator", "---"),
    ],
)
def test_flags_that_cannot_act_on_a_saved_cache_are_refused(run, tmp_path, flags):
    (tmp_path / "doc.kv").write_text("never read")
    code, _, err = run("ask", "--cache", "doc.kv", "-q", "?", *flags)
    named = "--chat" if flags == ("--no-chat",) else flags[0]
    assert code == 2 and f"{named} was settled when doc.kv was made" in err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ((*ASK, "--method", "knorm", "--set", "chunks=true"), "--prefill-chunk"),
        ((*ASK, "--set", "window=3", "--set", "window=4"), "--set window is given twice"),
        (
            ("eval", "--task", "niah-words", "--method", "knorm", "--set", "chunks=true",
             "--protocol", "question-aware"),
            "--prefill-chunk",
        ),
        (
            ("eval", "--task", "niah-words", "--method", "knorm", "--prefill-chunk", "64",
             "--protocol", "question-aware"),
            "--set chunks=true",
        ),
        ((*TELL, "--set", "chunks=true"), "--prefill-chunk"),
        ((*TELL, "--prefill-chunk", "8"), "--set chunks=true"),
        (("recommend", "--prompts", "manual.md"), ".txt file with one prompt on a line"),
        (("compress", "doc.txt", "-o", "a.kv", "--method", "knorm", "--set", "chunks=true"),
         "--prefill-chunk"),
        (("compare", "doc.txt", "-q", "?", "--method", "knorm", "--set", "chunks=true"),
         "--prefill-chunk"),
    ],
)  # fmt: skip
def test_settings_that_a_run_cannot_act_on_are_refused(run, tmp_path, command, said):
    (tmp_path / "manual.md").write_text("# A manual\n\nwith lines")
    code, _, err = run(*command)
    assert code == 2 and said in err and err.count("\n") == 1, err


def test_an_untested_architecture_is_accepted_when_that_is_asked_for(run, monkeypatch):
    from kvtrim.hf.models import architectures, load

    for module in (architectures, load):
        monkeypatch.setattr(module, "SUPPORTED", ("gemma2",))
    code, _, err = run(*ASK)
    assert code == 1 and "tested on gemma2" in err
    code, out, err = run(*ASK, "--allow-untested")
    assert code == 0 and out, err
