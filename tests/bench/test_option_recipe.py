"""CONTRIBUTING's "An option of `eval`", followed on a copy of the package: three files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from test_recipes import RECIPES, put

TESTS = Path(__file__).parents[1]
BLOCKS = RECIPES["An option of `eval`"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package with the recipe's lines put in."""
    home = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(TESTS.parent / "src", home / "src", ignore=ignored)
    for kind, block in BLOCKS:
        put(home, kind, block)
    return home / "src"


def kvtrim_of(copy, *words):
    return python_of(copy, "-m", "kvtrim", *map(str, words))


def python_of(copy, *words):
    paths = os.pathsep.join([str(copy), str(TESTS)])
    return subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_it_takes_three_files():
    files = {block.partition("\n")[0] for _, block in BLOCKS}
    assert len(files) == len(BLOCKS) == 3


def test_the_option_acts_is_recorded_and_bounded(copy, tmp_path, model_folder):
    command = ["eval", "-t", "bench.questions:WORDS_TASK", "--protocol", "question-aware"]
    command += ["--method", "snapkv", "--keep", "48", "--set", "window=8", "--limit", "2"]
    command += ["--model", model_folder, "--out", tmp_path / "run", "--json"]
    done = kvtrim_of(copy, *command, "--skip", "1")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["skip"] == 1
    asked = (tmp_path / "run" / "inputs.jsonl").read_text().splitlines()
    assert len(asked) == 1  # the second of two
    other = kvtrim_of(copy, *command)
    assert "holds another run: skip: 1 there, 0 here" in other.stderr and other.returncode == 2
    bad = kvtrim_of(copy, *command, "--skip", "-1")
    assert "skip = -1: use a whole number of at least 0" in bad.stderr and bad.returncode == 2


def test_a_sweep_takes_it_too(copy, tmp_path):
    lines = ["tasks", "methods", "keeps", "protocols"], ["niah", "full", "64", "question-aware"]
    text = "".join(f'{name} = ["{value}"]\n' for name, value in zip(*lines, strict=True))
    (tmp_path / "sweep.toml").write_text(text + "skip = 3\n")
    code = "from pathlib import Path\nfrom kvtrim.bench.sweep.spec import load\n"
    code += f"asked = load(Path({str(tmp_path / 'sweep.toml')!r}))\n"
    code += "print(asked.record()['skip'], asked.jobs()[0].grid().skip)"
    done = python_of(copy, "-c", code)
    assert done.stdout.split() == ["3", "3"], done.stderr
