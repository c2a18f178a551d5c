"""Methods and tasks of other packages, which are found as installed: by a dist-info folder."""

import json
import sys

import pytest

import kvtrim
from kvtrim.bench.eval import grid
from kvtrim.cli import main
from kvtrim.errors import UnknownNameError, UsageError
from kvtrim.methods.settings import find, names, places
from kvtrim.tasks import find_tasks

CODE = """
from kvtrim import Method
from kvtrim.methods.policies.knorm import KNorm

LONGEST = Method(KNorm(), source="a toy", use="Never.", cost="One norm per key.")
NUMBER = 3
"""
TASK = """
from kvtrim.tasks import Task

EMPTY = lambda request: iter(())
RIDDLES = Task("riddles", 1, "Asks.", "a toy", "exact", 4, EMPTY, lambda *_: 1.0)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A package with entry points, as pip leaves it behind; its modules are new for each test."""

    def put(entry_points, name="toys", modules=(("toys", CODE), ("toy_tasks", TASK))):
        site = tmp_path / name
        info = site / f"{name}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(entry_points)
        for module, code in modules:
            (site / f"{module}.py").write_text(code)
        monkeypatch.syspath_prepend(site)

    yield put
    for module in ("toys", "toy_tasks", "broken"):
        sys.modules.pop(module, None)


def methods(*lines):
    return "[kvtrim.methods]\n" + "\n".join(lines) + "\n"


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["kvtrim", *words])
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code


def test_an_installed_method_is_listed_and_found_by_its_name(install, monkeypatch, capsys):
    install(methods("longest = toys:LONGEST"))
    assert names() == [*kvtrim.METHODS, "longest"]
    assert "toys" not in sys.modules  # names alone need no import
    assert find("longest", window=3).policy.window == 3
    assert find("snapkv", policy="longest").policy == find("knorm").policy
    assert places(["longest", "snapkv", "a.b:C"]) == ("toys:LONGEST", "a.b:C")
    assert run(monkeypatch, "methods", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in listed] == names()
    assert run(monkeypatch, "methods", "longest") == 0
    assert "One norm per key." in capsys.readouterr().out


def test_kvtrims_own_methods_import_nothing_of_it(install):
    install(methods("longest = toys:LONGEST"))
    find("snapkv")
    assert "toys" not in sys.modules and "longest" not in kvtrim.METHODS


def test_it_answers(install, monkeypatch, capsys, tmp_path, model_folder):
    install(methods("longest = toys:LONGEST"))
    (tmp_path / "doc.txt").write_text("The cat sat on the mat and looked at the sea. " * 5)
    words = ["--method", "longest", "--keep", "40", "--model", str(model_folder), "--json"]
    asked = ["-q", "Where?", "--max-new-tokens", "3"]
    assert run(monkeypatch, "ask", str(tmp_path / "doc.txt"), *asked, *words) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["method"] == "longest" and record["held_bytes"] < record["full_bytes"]
    saved = str(tmp_path / "doc.kv")
    assert run(monkeypatch, "compress", str(tmp_path / "doc.txt"), "--out", saved, *words) == 0
    capsys.readouterr()
    from_it = ["ask", "--cache", saved, *asked, "--model", str(model_folder)]
    assert run(monkeypatch, *from_it) == 1  # a file does not decide what is imported
    assert "--method longest" in capsys.readouterr().err
    assert run(monkeypatch, *from_it, "--method", "longest") == 0


def test_an_installed_task_is_measured_under_its_name(install):
    install("[kvtrim.tasks]\nriddles = toy_tasks:RIDDLES\n")
    with pytest.raises(UnknownNameError, match=r"did you mean 'riddles'"):
        find_tasks(["riddle"])
    assert "toy_tasks" not in sys.modules
    assert [task.name for task in find_tasks(["niah", "riddles", "toy_tasks:RIDDLES"])] == [
        "niah",
        "riddles",
    ]


def test_a_record_tells_versions_of_its_code_apart(install):
    install("[kvtrim.tasks]\nriddles = toy_tasks:RIDDLES\n" + methods("longest = toys:LONGEST"))
    from kvtrim.tasks import places as task_places

    cells = grid.cells(["longest"], ["40"])
    asked = grid.Grid(grid.tasks(["riddles"]), cells, own_tasks=task_places(["riddles"]))
    assert asked.record()["outside"].keys() == {"toys:LONGEST", "toy_tasks:RIDDLES"}


@pytest.mark.parametrize("name", ["snapkv", "auto"])
def test_no_package_takes_a_name_of_kvtrims(install, name, monkeypatch, capsys):
    install(methods(f"{name} = toys:LONGEST"))
    refused = rf"method '{name}' comes with kvtrim, and toys 1.2 \(toys:LONGEST\) takes its name"
    with pytest.raises(UsageError, match=refused):
        find(name)
    assert find("adakv") is kvtrim.METHODS["adakv"]
    assert run(monkeypatch, "methods") == 2
    assert f"method '{name}' comes with kvtrim" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["niah", "ruler"])
def test_nor_that_of_a_task_or_of_a_group(install, name):
    install(f"[kvtrim.tasks]\n{name} = toy_tasks:RIDDLES\n")
    with pytest.raises(UsageError, match=f"task '{name}' comes with kvtrim, and toys 1.2"):
        find_tasks([name])


def test_two_packages_of_one_name_are_both_named(install):
    install(methods("longest = toys:LONGEST"))
    install(methods("longest = toys:LONGEST"), name="others", modules=())
    with pytest.raises(UsageError, match=r"others 1.2 .* and toys 1.2 .* both offer the method"):
        find("longest")


def test_a_task_has_the_name_that_it_is_installed_under(install):
    install("[kvtrim.tasks]\npuzzles = toy_tasks:RIDDLES\n")
    with pytest.raises(UsageError, match=r"toys 1.2 .* offers the task 'riddles' as 'puzzles'"):
        find_tasks(["puzzles"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("bad = nowhere:X", "No module named 'nowhere'"),
        ("bad = toys:NOTHING", "no attribute 'NOTHING'"),
        ("bad = broken:X", "ZeroDivisionError"),
        ("bad = toys:NUMBER", "'bad' of toys 1.2 (toys:NUMBER) is a int, not a kvtrim Method"),
    ],
)
def test_a_broken_entry_point_is_one_error_that_names_it(install, line, said, monkeypatch, capsys):
    modules = (("toys", CODE), ("broken", "X = 1 / 0\n"))
    install(methods(line, "longest = toys:LONGEST"), modules=modules)
    with pytest.raises(UsageError) as refused:
        find("bad")
    assert said in str(refused.value) and "'bad' of toys 1.2" in str(refused.value)
    assert run(monkeypatch, "methods", "--json") == 2  # the others are listed all the same
    shown = capsys.readouterr()
    assert "longest" in {one["name"] for one in json.loads(shown.out)}
    assert shown.err.count("\n") == 1 and "'bad' of toys 1.2" in shown.err
