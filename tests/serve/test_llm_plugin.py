"""`llm` answers from named documents."""

import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import kvtrim
from kvtrim.methods.request import Request
from kvtrim.serve import documents
from kvtrim.serve.library import Library
from late import Late

llm, llm_plugin = Late("llm"), Late("kvtrim.serve.llm_plugin")

TEXT = "The cat sat on the mat and looked at the sea. " * 4


@pytest.fixture
def model(monkeypatch, tmp_path, model_folder):
    monkeypatch.setenv("KVTRIM_LIBRARY", str(tmp_path / "library"))
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    loaded, tokenizer = kvtrim.load(model_folder)
    prints = documents.Prints.of(str(model_folder), loaded, tokenizer)
    how = documents.How(Request.of("snapkv", "48"))
    library = Library(tmp_path / "library")
    documents.add(library, "manual", loaded, tokenizer, prints, TEXT, how)
    found = []
    llm_plugin.register_models(found.append)
    names = [each.model_id for each in found]
    assert names == ["kvtrim/smollm2", f"kvtrim/{model_folder.name}@manual"]
    return found[1]


def test_a_document_is_a_model_of_llm(model, model_folder):
    loaded, tokenizer = kvtrim.load(model_folder)
    cache = kvtrim.compress(loaded, tokenizer, TEXT, method="snapkv", keep=48)
    alone = kvtrim.generate(loaded, tokenizer, cache, "Who?", max_new_tokens=6)
    assert model.prompt("Who?", max_tokens=6).text().strip() == alone.text
    pieces = list(model.prompt("Who?", max_tokens=6))
    assert "".join(pieces).strip() == alone.text


def test_a_conversation_goes_on(model):
    talk = model.conversation()
    first = talk.prompt("Who?", max_tokens=6).text()
    second = talk.prompt("Why?", max_tokens=6).text()
    assert first and second and second != model.prompt("Why?", max_tokens=6).text()


def test_llm_finds_the_plugin():
    project = Path(__file__).parents[2] / "pyproject.toml"
    named = tomllib.loads(project.read_text())["project"]["entry-points"]["llm"]["kvtrim"]
    assert import_module(named).register_models is llm_plugin.register_models
    assert issubclass(llm_plugin.Kvtrim, llm.Model)
