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
TRY = """
import json, sys, traceback
outcome = {}
for name, code in json.load(sys.stdin).items():
    try:
        exec(compile(code, name, "exec"), {"__name__": "recipe"})
        outcome[name] = "done"
    except Exception:
        outcome[name] = traceback.format_exc()
print(json.dumps(outcome))
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
        ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
    for name in NAMES:
        for kind, block in RECIPES[name]:
            if not block.startswith("# try it\n"):
                put(root, kind, block)
    return root


def within(copy, *command, given=""):
    paths = os.pathsep.join([str(copy / "src"), str(copy / "tests")])
    known = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, *command]
    return subprocess.run(run, input=given, env=known, cwd=copy, capture_output=True, text=True)


def test_what_they_add_works(copy):
    """Every "try it", in one process."""
    tries = {
        name: block
        for name in NAMES
        for kind, block in RECIPES[name]
        if block.startswith("# try it\n")
    }
    assert set(tries) == set(NAMES)
    done = within(copy, "-c", TRY, given=json.dumps(tries))
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    failed = {name: said for name, said in outcomes.items() if said != "done"}
    assert not failed and len(outcomes) == len(NAMES), "\n".join(failed.values())


def test_what_they_add_meets_the_contracts(copy):
    """Of methods, tasks and architectures."""
    names = "longest or boxes or (arcee and check_finds)"
    files = ("methods/test_contract.py", "tasks/test_table.py", "hf/test_models.py")
    paths = [f"tests/{file}" for file in files]
    done = within(copy, "-m", "pytest", *paths, "-k", names, "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 10


def test_the_linter_likes_them(copy):
    pytest.importorskip("ruff", reason="ruff is not installed (make setup)")
    added = [
        block.partition("\n")[0].removeprefix("# ")
        for name in NAMES
        for kind, block in RECIPES[name]
        if block.startswith("# src/")
    ]
    done = within(copy, "-m", "ruff", "check", *added)
    assert done.returncode == 0, done.stdout


def test_the_entry_points_are_toml():
    ((kind, block),) = RECIPES["Packages"]
    groups = tomllib.loads(block)["project"]["entry-points"]
    assert kind == "toml" and set(groups) == {"kvtrim.methods", "kvtrim.tasks"}
