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
OPTION = "An option of `eval`"
FOLLOW = """
import contextlib, io, json, sys, traceback
import pytest

asked = json.load(sys.stdin)
outcome = {"contracts": int(pytest.main(asked["contracts"])), "tries": {}, "commands": []}

for name, code in asked["tries"].items():
    try:
        exec(compile(code, name, "exec"), {"__name__": "recipe"})
        outcome["tries"][name] = "done"
    except Exception:
        outcome["tries"][name] = traceback.format_exc()

from kvtrim.cli import main

for words in asked["commands"]:
    sys.argv, said = ["kvtrim", *words], io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as left:
            code = left.code
    outcome["commands"].append([code, said.getvalue()])
print()
print(json.dumps(outcome))
"""
SWEEP = """
from pathlib import Path
from kvtrim.bench.sweep.spec import load
asked = load(Path(PATH))
assert [asked.record()["skip"], asked.jobs()[0].grid().skip] == [3, 3]
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
    shutil.copy(ROOT / "pyproject.toml", root)
    for folder in ("src", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
    for name in (*NAMES, OPTION):
        for kind, block in RECIPES[name]:
            if not block.startswith("# try it\n"):
                put(root, kind, block)
    return root


def within(copy, *command, given=""):
    paths = os.pathsep.join([str(copy / "src"), str(copy / "tests")])
    known = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, *command]
    return subprocess.run(run, input=given, env=known, cwd=copy, capture_output=True, text=True)


@pytest.fixture(scope="module")
def followed(copy, model_folder, tmp_path_factory):
    """What came of everything that the recipes promise, in one process of the copy."""
    out = tmp_path_factory.mktemp("followed")
    tries = {
        name: block
        for name in NAMES
        for kind, block in RECIPES[name]
        if block.startswith("# try it\n")
    }
    assert set(tries) == set(NAMES)

    lines = ["tasks", "methods", "keeps", "protocols"], ["niah", "full", "64", "question-aware"]
    text = "".join(f'{name} = ["{value}"]\n' for name, value in zip(*lines, strict=True))
    (out / "sweep.toml").write_text(text + "skip = 3\n")
    tries["a sweep"] = SWEEP.replace("PATH", repr(str(out / "sweep.toml")))

    command = ["eval", "-t", "bench.questions:WORDS_TASK", "--protocol", "question-aware"]
    command += ["--method", "snapkv", "--keep", "48", "--set", "window=8", "--limit", "2"]
    command += ["--model", str(model_folder), "--out", str(out / "run"), "--json"]
    commands = [[*command, "--skip", "1"], command, [*command, "--skip", "-1"]]

    names = "longest or boxes or (arcee and check_finds)"
    files = ("methods/test_contract.py", "tasks/test_table.py", "hf/test_models.py")
    contracts = [*(f"tests/{file}" for file in files), "-k", names, "-p", "no:cacheprovider"]

    asked = {"contracts": contracts, "tries": tries, "commands": commands}
    done = within(copy, "-c", FOLLOW, given=json.dumps(asked))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    said, _, outcome = done.stdout.rstrip().rpartition("\n")
    return json.loads(outcome) | {"said": said, "run": out / "run"}


@pytest.mark.process
def test_what_they_add_works(followed):
    """Every "try it"."""
    failed = [said for said in followed["tries"].values() if said != "done"]
    assert not failed and len(followed["tries"]) == len(NAMES) + 1, "\n".join(failed)


@pytest.mark.process
def test_what_they_add_meets_the_contracts(followed):
    """Of methods, tasks and architectures."""
    assert followed["contracts"] == 0, followed["said"][-3000:]
    assert int(re.search(r"(\d+) passed", followed["said"])[1]) >= 10


def test_an_option_takes_three_files():
    blocks = RECIPES[OPTION]
    assert len({block.partition("\n")[0] for _, block in blocks}) == len(blocks) == 3


@pytest.mark.process
def test_an_option_acts_is_recorded_and_bounded(followed):
    """In a sweep too: see `SWEEP`."""
    done, other, bad = followed["commands"]
    assert done[0] == 0, done[1]
    assert json.loads((followed["run"] / "run.json").read_text())["skip"] == 1
    asked = (followed["run"] / "inputs.jsonl").read_text().splitlines()
    assert len(asked) == 1  # the second of two
    assert other[0] == 2 and "holds another run: skip: 1 there, 0 here" in other[1]
    assert bad[0] == 2 and "skip = -1: use a whole number of at least 0" in bad[1]


def test_the_linter_likes_them(copy):
    pytest.importorskip("ruff", reason="ruff is not installed (make setup)")
    added = [
        block.partition("\n")[0].removeprefix("# ")
        for name in (*NAMES, OPTION)
        for kind, block in RECIPES[name]
        if block.startswith("# src/")
    ]
    done = within(copy, "-m", "ruff", "check", *added)
    assert done.returncode == 0, done.stdout


def test_the_entry_points_are_toml():
    ((kind, block),) = RECIPES["Packages"]
    groups = tomllib.loads(block)["project"]["entry-points"]
    assert kind == "toml" and set(groups) == {"kvtrim.methods", "kvtrim.tasks"}
