"""CONTRIBUTING's "Add a method", followed to the letter by a newcomer with a package of their own.

The toy keeps the slots whose values are longest; its file is `knorm.py` with three lines changed.
"""

import inspect
import json
import sys
from pathlib import Path

import pytest
import test_contract
import torch

import kvtrim
from kvtrim.cli import main
from kvtrim.methods.describe.entries import entry
from kvtrim.methods.policies import knorm

NAME = "toys.methods:LONGEST"
CONTRACTS = {
    name: check
    for name, check in vars(test_contract).items()
    if name.startswith("test_") and "name" in inspect.signature(check).parameters
}


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    """Steps 1 and 2 of the recipe."""
    copied = Path(knorm.__file__).read_text()
    docstring = copied.split('"""')[1]
    changed = (
        copied.replace(docstring, "Longest: values of large norm stay.\n\nPaper: none.\n")
        .replace("class KNorm", "class Longest")
        .replace("return -layer.keys.float()", "return layer.values.float()")
    )
    assert changed != copied
    entry_of_it = (
        "from kvtrim import Method\n"
        "from toys.longest import Longest\n"
        'LONGEST = Method(Longest(), source="a toy", use="Never.", cost="One norm per value.")\n'
    )
    folder = tmp_path / "toys"
    folder.mkdir()
    (folder / "longest.py").write_text(changed)
    (folder / "methods.py").write_text(entry_of_it)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for module in [name for name in sys.modules if name.partition(".")[0] == "toys"]:
        del sys.modules[module]


def test_the_recipe_has_at_most_six_lines():
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    recipe = text.partition("## Add a method\n\n")[2].partition("\n\n")[0].splitlines()
    assert [line[:2] for line in recipe] == [f"{n}." for n in range(1, len(recipe) + 1)]
    assert len(recipe) <= 6
    for step in ("knorm.py", "METHODS", "kvtrim ask", "make docs", "make test", "module:NAME"):
        assert any(step in line for line in recipe), step


def test_it_selects():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(heads, 50, 8, generator=draw) for heads in (4, 2, 2))
    kept = kvtrim.select(NAME, q, k, v, keep=10)
    for head in range(2):
        want = sorted(v[head].norm(dim=-1).topk(10).indices.tolist())
        assert kept[0][head].tolist() == want
    recent = kvtrim.select(NAME, q, k, v, keep=10, window=4, budget="per-head")
    assert all(set(range(46, 50)) <= set(head.tolist()) for head in recent[0])


@pytest.mark.parametrize("contract", CONTRACTS)
def test_it_meets_every_contract_of_the_registry(contract):
    CONTRACTS[contract](NAME)


def test_there_are_contracts_to_meet():
    assert len(CONTRACTS) >= 9


def test_it_explains_itself():
    told = entry(NAME)
    assert told.record()["summary"] == "Longest: values of large norm stay."
    assert (told.method.use, told.method.cost) == ("Never.", "One norm per value.")
    meanings = {p.name: p.meaning for p in told.parameters}
    assert meanings["window"] == "newest slots always kept; the paper reserves none"


def test_it_answers_on_the_command_line(monkeypatch, capsys, tmp_path, model_folder):
    (tmp_path / "doc.txt").write_text("The cat sat on the mat and looked at the sea. " * 5)
    command = [
        "ask", str(tmp_path / "doc.txt"), "-q", "Where?", "--method", NAME, "--keep", "40",
        "--set", "window=4", "--max-new-tokens", "3", "--json", "--model", str(model_folder),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["kvtrim", *command])
    with pytest.raises(SystemExit) as left:
        main()
    record = json.loads(capsys.readouterr().out)
    assert left.value.code == 0
    assert record["method"] == NAME and record["held_bytes"] < record["full_bytes"]
