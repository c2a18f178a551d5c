"""The commands as a user types them."""

import json
import re
import subprocess
import sys

import pytest
from typer.main import get_command

import kvtrim
from kvtrim.cli import app, options
from kvtrim.hf.models import random
from kvtrim.methods.describe.markdown import manual


def test_ask_prints_the_answer_and_what_it_took(run):
    code, out, err = run("ask", "doc.txt", "-q", "?", "--keep", "64", "--max-new-tokens", "5")
    assert code == 0
    assert out.strip()
    assert re.search(r"adakv 64, question-aware: \d+ prompt tokens, first token after", err)
    assert "auto is adakv: the question is known" in " ".join(err.split())


def test_ask_as_json_holds_every_figure(run):
    code, out, _ = run(
        "ask", "doc.txt", "-q", "Where?", "--method", "adakv", "--keep", "25%",
        "--set", "window=8", "--max-new-tokens", "5", "--json",
    )  # fmt: skip
    record = json.loads(out)
    assert code == 0
    assert record["protocol"] == "question-aware" and record["method"] == "adakv"
    assert record["held_bytes"] < record["full_bytes"] / 3
    assert len(record["kept"]) == 3 and len(record["kept"][0]) == 2
    assert record["answers"][0]["question"] == "Where?"
    assert record["ttft_s"] > 0 and record["tpot_s"] > 0


def test_what_is_clearly_not_held_as_asked_is_said_once(run):
    of_heads = ("--method", "snapkv", "--keep", "64", "--set", "preset=upstream", "--set")
    asked, why = (*of_heads, "window=8"), "every query head stores its own, 3 per KV head"
    new = ("--max-new-tokens", "2")
    for command in (
        ("ask", "doc.txt", "-q", "Where?", *asked, *new),
        ("ask", "doc.txt", "-q", "Where?", "-q", "Who?", *asked, *new),
        ("compress", "doc.txt", "-o", "cache.kv", *asked),
        ("ask", "--cache", "cache.kv", "-q", "Where?", *new),
        ("compare", "doc.txt", "-q", "Where?", *asked, *new),
    ):
        code, out, err = run(*command)
        assert (code, err.count(why), out.count(why)) == (0, 1, 0), command
    code, out, _ = run("ask", "doc.txt", "-q", "Where?", *asked, *new, "--json")
    assert code == 0 and why in json.loads(out)["remark"]


def test_a_document_is_split_into_shots(run, tmp_path):
    shots = "\n---\n".join(f"Question {i}: why? " + "So. " * i * i for i in range(6))
    (tmp_path / "shots.txt").write_text(shots)
    asked = ("-q", "Why?", "--method", "shotkv", "--keep", "50%", "--max-new-tokens", "4")
    code, out, _ = run("ask", "shots.txt", *asked, "--shots-separator", r"\n---\n", "--json")
    split = json.loads(out)
    assert code == 0 and split["method"] == "shotkv"
    code, out, _ = run("ask", "shots.txt", *asked, "--json")
    assert code == 0 and json.loads(out)["kept"] != split["kept"]
    run("compress", "shots.txt", "--method", "shotkv", "--shots-separator", "---", "-o", "s.kv")
    code, out, _ = run("ask", "--cache", "s.kv", "-q", "Why?", "--max-new-tokens", "3")
    assert code == 0
    code, out, _ = run("compare", "shots.txt", *asked, "--shots-separator", "---")
    assert code == 0 and "shotkv" in out
    code, _, err = run("ask", "shots.txt", *asked, "--shots-separator", "###")
    assert code == 2 and "'###' does not occur" in err


def test_several_questions_are_asked_of_one_compressed_context(run):
    code, out, _ = run(
        "ask", "doc.txt", "-q", "Where?", "-q", "Who?", "--keep", "64", "--max-new-tokens", "4",
        "--json",
    )  # fmt: skip
    record = json.loads(out)
    assert code == 0 and record["protocol"] == "question-agnostic"
    assert [a["question"] for a in record["answers"]] == ["Where?", "Who?"]


def test_a_document_can_come_from_standard_input(run, monkeypatch, tmp_path):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO((tmp_path / "doc.txt").read_text()))
    code, out, _ = run(
        "ask", "-", "-q", "Where?", "--keep", "64", "--max-new-tokens", "3", "--json"
    )
    assert code == 0 and json.loads(out)["prompt_tokens"] > 250


def test_compress_saves_a_cache_that_ask_uses(run, tmp_path):
    code, out, _ = run("compress", "doc.txt", "-o", "doc.kv", "--keep", "64", "--json")
    saved = json.loads(out)
    assert code == 0 and saved["protocol"] == "question-agnostic"
    assert saved["file_bytes"] == (tmp_path / "doc.kv").stat().st_size
    cached = ("ask", "--cache", "doc.kv", "-q", "Where?", "--max-new-tokens", "6", "--json")
    code, out, _ = run(*cached)
    assert code == 0
    direct = run(
        "ask", "doc.txt", "-q", "Where?", "--keep", "64", "--max-new-tokens", "6",
        "--protocol", "question-agnostic", "--json",
    )  # fmt: skip
    assert (
        json.loads(out)["answers"][0]["token_ids"]
        == json.loads(direct[1])["answers"][0]["token_ids"]
    )


def test_compare_puts_the_full_cache_first(run):
    arguments = ("compare", "doc.txt", "-q", "Where?", "--method", "snapkv", "--method", "adakv")
    budgets = ("--keep", "64", "--keep", "80", "--max-new-tokens", "4")
    code, out, _ = run(*arguments, *budgets, "--json")
    records = json.loads(out)
    assert code == 0
    assert [(r["method"], r["keep"]) for r in records[1:]] == [
        ("snapkv", "64"), ("snapkv", "80"), ("adakv", "64"), ("adakv", "80"),
    ]  # fmt: skip
    assert records[0]["method"] == "full"
    code, out, _ = run(*arguments, *budgets)
    assert code == 0 and "entries per head" in out and "question-aware" in out


def test_methods_are_listed_and_explained(run):
    code, out, _ = run("methods", "--json", model=False)
    listed = json.loads(out)
    assert code == 0
    for wanted in ("name", "scorer", "budget", "schedule", "propagation", "source"):
        assert all(record[wanted] for record in listed)
    code, out, _ = run("methods", "adakv", "--json", model=False)
    assert json.loads(out)["parameters"]["budget.floor"] == "0.2"
    code, out, _ = run("methods", "auto", model=False)
    assert code == 0 and "echo-window:refit=values+bias" in out
    assert "Uniform" not in out and "parameters" not in out
    code, out, _ = run("methods", "adakv", model=False)
    assert code == 0 and "kvpress" in out
    shown = " ".join(out.split())
    method = kvtrim.METHODS["adakv"]
    assert all(said in shown for said in (method.use, method.cost, method.source))
    assert "floor 0.2 float (0 to 1) the share that is dealt out evenly" in shown
    assert "upstream granularity kv → query, floor 0.2 → 0.5" in shown
    out = run("methods", model=False)[1]
    assert all(name in out for name in kvtrim.METHODS)
    for heading in ("scores by", "budget", "evicts", "propagation", "source"):
        assert heading in out


def test_methods_as_markdown_is_the_page_of_the_documentation(run):
    code, page, _ = run("methods", "--markdown", model=False)
    assert code == 0 and page == manual()
    code, one, _ = run("methods", "h2o", "--markdown", model=False)
    assert code == 0 and one.startswith("## h2o\n") and one in page


def test_a_method_of_your_own_is_explained_too(run):
    code, out, _ = run("methods", "test_settings:MINE", model=False)
    assert code == 0 and "KNorm: keys of small length" in out


def test_check_says_that_a_supported_model_works(run, model_folder):
    code, out, _ = run("check", str(model_folder), "--json", model=False)
    assert code == 0 and json.loads(out)["works"]
    assert "full kvtrim cache" in run("check", str(model_folder), model=False)[1]


def test_version_and_help(run):
    code, out, _ = run("--version", model=False)
    assert code == 0 and out.startswith("kvtrim ")
    for command in ("ask", "compare", "compress", "methods", "speed", "check"):
        code, out, _ = run(command, "--help", model=False)
        assert code == 0 and "--json" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ask", "none.txt", "-q", "?"), "no such document: none.txt"),
        (("ask", "empty.txt", "-q", "?"), "the document empty.txt is empty"),
        (("ask", "binary.bin", "-q", "?"), "is not UTF-8 text"),
        (("ask", "folder", "-q", "?"), "is a folder"),
        (("ask", "-q", "?"), "no document given"),
        (("ask", "doc.txt"), "no question"),
        (("ask", "doc.txt", "-q", " "), "no question"),
        (("ask", "doc.txt", "-q", "?", "--method", "snapvk"), "did you mean 'snapkv'"),
        (("ask", "doc.txt", "-q", "?", "--keep", "0"), "keeps nothing"),
        (("ask", "doc.txt", "-q", "?", "--keep", "150%"), "more than the whole prompt"),
        (("ask", "doc.txt", "-q", "?", "--keep", "20"), "Use keep=33 or more"),
        (("ask", "doc.txt", "-q", "?", "--set", "window"), "write name=value"),
        (("ask", "doc.txt", "-q", "?", "--set", "window=3"), "auto takes no settings"),
        (
            ("ask", "doc.txt", "-q", "?", "--method", "snapkv", "--set", "windw=3"),
            "did you mean 'window'",
        ),
        (
            ("ask", "doc.txt", "-q", "?", "--method", "snapkv", "--set", "preset=kvpres"),
            "did you mean 'kvpress'",
        ),
        (
            ("ask", "doc.txt", "-q", "?", "--protocol", "both"),
            "question-aware or question-agnostic",
        ),
        (("ask", "doc.txt", "-q", "?", "--truncate", "left"), "error or middle"),
        (("ask", "doc.txt", "-q", "?", "--max-new-tokens", "400"), "leaves room for"),
        (("ask", "doc.txt", "-q", "?", "--cache", "doc.kv"), "not both"),
        (("ask", "--cache", "none.kv", "-q", "?"), "no such cache file"),
        (("ask", "doc.txt", "-q", "?", "--kep", "9"), "No such option: --kep"),
        (("ask", "doc.txt", "-q", "?", "--device", "warp"), "unknown device"),
        (("ask", "doc.txt", "-q", "?", "--dtype", "float13"), "unknown dtype"),
        (("compress", "doc.txt", "-o", "nowhere/doc.kv"), "there is no folder nowhere"),
        (("compress", "doc.txt", "-o", "folder"), "is a folder"),
        (("compare", "doc.txt", "-q", "?", "-q", "!"), "compare asks one question"),
        (("asks",), "Did you mean 'ask'"),
        (("methods", "snapvk"), "did you mean 'snapkv'"),
        (("methods", "--json", "--markdown"), "choose one"),
    ],
)
def test_every_bad_input_is_one_line_and_an_exit_code(run, tmp_path, arguments, message):
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)))
    (tmp_path / "folder").mkdir()
    code, out, err = run(*arguments, model=arguments[0] not in ("asks", "methods"))
    assert code in (1, 2)
    assert message in err
    assert err.startswith("kvtrim: ") and err.count("\n") == 1, err
    assert out == ""


def test_a_broken_cache_file_fails_with_one_line(run, tmp_path):
    (tmp_path / "bad.kv").write_text("nothing")
    code, _, err = run("ask", "--cache", "bad.kv", "-q", "?")
    assert code == 1 and "no cache file" in err and err.count("\n") == 1


def test_an_interrupt_leaves_quietly(run, monkeypatch):
    import kvtrim.api

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(kvtrim.api, "generate", interrupted)
    code, _, err = run("ask", "doc.txt", "-q", "?", "--keep", "64")
    assert (code, err) == (130, "kvtrim: interrupted\n")


def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "kvtrim", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("kvtrim ")


SWEEP = """
tasks = ["ruler"]
methods = ["snapkv"]
keeps = ["64"]
models = ["smollm2"]
protocols = ["question-aware"]
"""
CHOOSES = {
    "ask": ("doc.txt", "-q", "?"),
    "compress": ("doc.txt",),
    "compare": ("doc.txt", "-q", "?"),
    "view": ("doc.txt",),
    "eval": ("--task", "bench.questions:WORDS_TASK"),
    "recommend": ("--prompts", "doc.txt"),
    "analyze": ("mass", "doc.txt"),
}


@pytest.mark.parametrize("option", ["--protocol", "--truncate"])
def test_a_choice_that_there_is_not_is_refused_before_any_work(run, monkeypatch, option):
    def work(*_, **__):
        pytest.fail("a model was loaded")

    monkeypatch.setattr(options, "load", work)
    taking = {
        name
        for name, one in get_command(app).commands.items()
        for each in one.params
        if option in each.opts
    }
    assert taking and taking <= {*CHOOSES}
    for command in sorted(taking):
        code, out, err = run(command, *CHOOSES[command], option, "neither", model=False)
        assert code == 2 and option in err and err.count("\n") == 1 and not out, command


WRITES_A_FOLDER = {
    "eval": ("--task", "bench.questions:WORDS_TASK", "--protocol", "question-aware"),
    "sweep": ("sweep.toml",),
    "speed": ("--config", "smollm2-135m", "--length", "64"),
    "papers": ("run", "curdkv/table-2"),
    "analyze": ("mass", "doc.txt"),
    "report": ("folder",),
}


def test_every_command_that_writes_a_folder_is_tried_here():
    takes = {
        name
        for name, one in get_command(app).commands.items()
        for each in (one, *getattr(one, "commands", {}).values())
        for option in each.params
        if option.name == "out" and "a folder" in (option.help or "").lower()
    }
    assert {"eval", "sweep", "papers"} <= takes <= {*WRITES_A_FOLDER}


@pytest.mark.parametrize("place", ["doc.txt", "nowhere/x"])
@pytest.mark.parametrize("command", WRITES_A_FOLDER)
def test_a_place_that_can_be_no_folder_is_refused_before_any_work(
    run, tmp_path, monkeypatch, command, place
):
    def work(*_, **__):
        pytest.fail("a model was loaded")

    monkeypatch.setattr(options, "load", work)
    monkeypatch.setattr(random, "build", work)
    (tmp_path / "sweep.toml").write_text(SWEEP)
    (tmp_path / "folder").mkdir()
    asked = (command, *WRITES_A_FOLDER[command], "--out", place)
    code, out, err = run(*asked, model=False)
    said = "name a folder" if place == "doc.txt" else "there is no folder nowhere"
    assert code == 2 and said in err and err.count("\n") == 1 and not out
    assert (tmp_path / "doc.txt").is_file()
