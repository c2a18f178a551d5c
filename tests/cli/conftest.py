"""Commands run in this process, as a user types them."""

import sys

import pytest

from kvtrim.cli import main

DOCUMENT = "The cat sat on the mat and looked at the wide blue sea. " * 5


@pytest.fixture(autouse=True)
def drawn_once(monkeypatch):
    """Pictures of commands are not measured before they are drawn; those of tests/report are."""
    from kvtrim.report.plots import style

    monkeypatch.setattr(style, "_LAYOUT", "none")


@pytest.fixture
def invoke(monkeypatch, capsys, tmp_path):
    """Run it in an empty folder; gives (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["kvtrim", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        printed = capsys.readouterr()
        return left.value.code, printed.out, printed.err

    return call


@pytest.fixture
def run(invoke, tmp_path, model_folder):
    """Likewise, of a tiny model and beside a document, `doc.txt`."""
    (tmp_path / "doc.txt").write_text(DOCUMENT)

    def call(*arguments, model=True):
        return invoke(*arguments, *(["--model", model_folder] if model else []))

    return call
