"""Named documents as a user types them."""

import json
import re

import pytest

from kvtrim.serve import documents

SHORT = ("--method", "snapkv", "--keep", "48", "--set", "window=8")


@pytest.fixture(autouse=True)
def library(monkeypatch, tmp_path):
    monkeypatch.setenv("KVTRIM_LIBRARY", str(tmp_path / "library"))


def test_a_named_document_is_read_once(run):
    code, out, _ = run("compress", "doc.txt", "--name", "manual", *SHORT)
    assert "1 document in" in run("caches", model=False)[1]
    tokens = int(re.search(r"@manual: (\d+) tokens, .*snapkv 48", " ".join(out.split()))[1])
    assert code == 0 and "not read again" not in out
    _, out, _ = run("compress", "doc.txt", "--name", "manual", *SHORT)
    assert "not read again" in " ".join(out.split())
    code, out, err = run("ask", "@manual", "-q", "Where?", "--max-new-tokens", "5")
    assert code == 0 and out.strip()
    assert f"0 of {tokens} document tokens re-read" in " ".join(err.split())
    code, out, _ = run("ask", "@manual", "-q", "Where?", "--max-new-tokens", "5", "--json")
    record = json.loads(out)
    assert record["reused_tokens"] == tokens
    assert record["read_tokens"] == record["prompt_tokens"] - tokens
    code, out, _ = run("ask", "doc.txt", "-q", "Where?", "-q", "Who?", *SHORT, "--json")
    record = json.loads(out)
    assert record["reused_tokens"] == 0 and record["read_tokens"] > tokens


def test_the_library_is_listed_verified_and_cleared(run, tmp_path):
    assert "no documents in" in run("caches", model=False)[1]
    text = (tmp_path / "doc.txt").read_text()
    for name in ("one", "two"):
        (tmp_path / "doc.txt").write_text(text + name)
        run("compress", "doc.txt", "--name", name, *SHORT)
    code, out, _ = run("caches", model=False)
    assert code == 0 and all(word in out for word in ("@one", "@two", "snapkv", "48"))
    assert "2 documents in" in out
    listed = json.loads(run("caches", "--json", model=False)[1])
    assert {each["name"] for each in listed} == {"one", "two"}
    code, out, _ = run("caches", "verify", model=False)
    assert code == 0 and out.count("as it was written") == 2
    assert run("caches", "rename", "one", "@first", model=False)[0] == 0
    assert run("ask", "@first", "-q", "Where?", "--max-new-tokens", "2")[0] == 0
    code, out, _ = run("caches", "prune", f"{listed[0]['file_bytes'] + 100}B", model=False)
    assert code == 0 and "@two removed" in out
    path = next((tmp_path / "library" / "caches").iterdir())
    path.write_bytes(path.read_bytes()[:-1])
    code, out, err = run("caches", "verify", "first", model=False)
    assert code == 1 and "@first" in out and "damaged" in err
    assert run("caches", "remove", "first", model=False)[0] == 0
    assert "no documents in" in run("caches", model=False)[1]
    code, _, err = run("caches", "remove", "first", model=False)
    assert code == 2 and "the library" in err and "Traceback" not in err


def test_what_is_removed_while_others_are_verified_is_no_damage(run, monkeypatch):
    run("compress", "doc.txt", "--name", "manual", *SHORT)
    verify = documents.verify

    def removed_first(own, entry):
        own.remove(entry.name)
        return verify(own, entry)

    monkeypatch.setattr(documents, "verify", removed_first)
    code, out, err = run("caches", "verify", model=False)
    assert code == 0 and "@manual: was removed meanwhile" in out, err


def test_what_was_settled_is_refused_again(run):
    run("compress", "doc.txt", "--name", "manual", *SHORT)
    code, _, err = run("ask", "@manual", "-q", "Where?", "--keep", "12")
    assert code == 2 and "--keep was settled when @manual was compressed" in err
    code, _, err = run("ask", "@manul", "-q", "Where?")
    assert code == 2 and "did you mean 'manual'" in err
    code, _, err = run("compress", "doc.txt", "--name", "../x", *SHORT)
    assert code == 2 and "is no name" in err
    code, _, err = run("compress", "doc.txt", "--name", "x", "--out", "y.kv", *SHORT)
    assert code == 2 and "--out" in err
    code, _, err = run("ask", "doc.txt", "-q", "Where?", "--seed", "3")
    assert code == 2 and "--temperature" in err
    sampled = ("ask", "doc.txt", "-q", "Where?", "--temperature")
    code, _, err = run(*sampled, "0.5", "--seed", str(10**30))
    assert code == 2 and "64-bit" in err
    code, _, err = run(*sampled, "1e40")
    assert code == 2 and "at most 10" in err
    code, _, err = run(*sampled, "1e-300", *SHORT, "--max-new-tokens", "2")
    assert code == 0, err
    code, _, err = run("caches", "prune", "half", model=False)
    assert code == 2 and "write 2GiB" in err


def test_the_text_of_a_named_document_is_compared(run):
    run("compress", "doc.txt", "--name", "manual", *SHORT)
    given = ("-q", "Where?", *SHORT, "--max-new-tokens", "3", "--json")
    named = json.loads(run("compare", "@manual", *given)[1])
    plain = json.loads(run("compare", "doc.txt", *given)[1])
    assert [each["answers"][0]["text"] for each in named] == [
        each["answers"][0]["text"] for each in plain
    ]


def test_streamed_answers_are_the_same(run):
    given = ("-q", "Where?", "--max-new-tokens", "8")
    run("compress", "doc.txt", "--name", "manual", *SHORT)
    for document in (("doc.txt", *SHORT), ("@manual",)):
        for sampled in ((), ("--temperature", "0.8", "--top-p", "0.9", "--seed", "3")):
            _, plain, _ = run("ask", *document, *given, *sampled)
            code, streamed, err = run("ask", *document, *given, *sampled, "--stream")
            assert code == 0 and "tokens read" in " ".join(err.split())
            assert "".join(streamed.split()) == "".join(plain.split())
    code, out, _ = run("ask", "@manual", *given, "-q", "Who?", "--stream")
    assert code == 0 and "Who?" in out
    code, _, err = run("ask", "doc.txt", *given, "-q", "Who?", "--stream")
    assert code == 2 and "compress FILE" in err
