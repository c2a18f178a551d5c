"""The recipes of CONTRIBUTING.md, followed to the letter in a copy of the project."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RECIPES = {
    section.partition("\n")[0]: re.findall(r"```(\w+)\n(.*?)```", section, re.S)
    for section in re.split(r"^##+ ", PAGE, flags=re.M)
}
NAMES = (
    "A scoring rule",
    "A budget",
    "A propagation",
    "A task",
    "An architecture",
    "A kernel",
)
TRIED = """
import json, pathlib, pytest
TRIES = json.loads((pathlib.Path(__file__).parent / "tries.json").read_text())

@pytest.mark.parametrize("name", TRIES)
def test_tried(name):
    exec(compile(TRIES[name], name, "exec"), {"__name__": "recipe"})
"""


def put(root, kind, block):
    """One block of a recipe: a new file, or a change of one."""
    name = block.partition("\n")[0].removeprefix("# ")
    path = root / name
    assert name.startswith(("src/", "tests/")), name
    if kind == "python":
        assert not path.exists(), name
        path.write_text(block.partition("\n")[2])
        return
    text = path.read_text()
    for hunk in block.partition("\n")[2].split("@@\n"):
        lines = hunk.splitlines()
        before = "\n".join(line[1:] for line in lines if line[:1] in " -")
        after = "\n".join(line[1:] for line in lines if line[:1] in " +")
        assert text.count(before) == 1, f"{name} does not hold once:\n{before}"
        text = text.replace(before, after)
    path.write_text(text)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project with everything added that the recipes add."""
    root = tmp_path_factory.mktemp("copy")
    for folder in ("src", "tests"):
        shutil.copy(ROOT / "pyproject.toml", root)
        ignored = shutil.ignore_patterns("*.safetensors")  # what is compiled goes along
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
    for name in NAMES:
        for kind, block in RECIPES[name]:
            if not block.startswith("# try it\n"):
                put(root, kind, block)
    return root


def within(copy, *command):
    paths = os.pathsep.join([str(copy / "src"), str(copy / "tests")])
    known = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", *command]
    return subprocess.run(run, env=known, cwd=copy, capture_output=True, text=True)


@pytest.fixture(scope="module")
def outcomes(copy):
    """Of every "try it", and of the contracts of what they add, in one process."""
    tries = {
        name: block
        for name in NAMES
        for kind, block in RECIPES[name]
        if block.startswith("# try it\n")
    }
    (copy / "tests" / "test_tries.py").write_text(TRIED)
    (copy / "tests" / "tries.json").write_text(json.dumps(tries))
    names = "tried or longest or boxes or (arcee and check_finds)"
    files = ("test_tries.py", "methods/test_contract.py", "tasks/test_table.py")
    paths = [f"tests/{file}" for file in (*files, "hf/test_models.py")]
    done = within(copy, "pytest", *paths, "-rA", "-k", names, "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-3000:]
    return re.findall(r"^PASSED (\S+?)::(.*)", done.stdout, re.M)


def test_what_they_add_works(outcomes):
    tried = {test for file, test in outcomes if file == "tests/test_tries.py"}
    assert tried == {f"test_tried[{name}]" for name in NAMES}


def test_what_they_add_meets_the_contracts(outcomes):
    """Of methods, tasks and architectures."""
    files = [file for file, _ in outcomes if file != "tests/test_tries.py"]
    assert len(files) >= 10 and len(set(files)) == 3


def test_the_linter_likes_them(copy):
    pytest.importorskip("ruff", reason="ruff is not installed (make setup)")
    added = [
        block.partition("\n")[0].removeprefix("# ")
        for name in NAMES
        for kind, block in RECIPES[name]
        if block.startswith("# src/")
    ]
    done = within(copy, "ruff", "check", *added)
    assert done.returncode == 0, done.stdout


def test_the_entry_points_are_toml():
    ((kind, block),) = RECIPES["Packages"]
    groups = tomllib.loads(block)["project"]["entry-points"]
    assert kind == "toml" and set(groups) == {"kvtrim.methods", "kvtrim.tasks"}
