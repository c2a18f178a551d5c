"""The import arrows of docs/design.md, read off the code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "kvtrim"

# a room may import itself, what it names here, and what those may import
ARROWS = {
    "errors": [],
    "version": [],
    "ranges": ["errors"],
    "files": ["errors"],
    "records": ["files"],
    "statistics": ["errors"],
    "types": [],
    "spans": ["types", "errors"],
    "ops": ["spans", "kernels"],
    "projections": ["ops"],
    "schedules": ["ranges"],
    "units": ["spans", "ranges"],
    "selection": ["units"],
    "policies": ["ranges", "projections", "energy", "markov", "echo_tables"],
    "echo_tables": ["types", "errors", "files"],
    "energy": ["types"],
    "markov": ["types"],
    "budgets": ["types", "ranges", "files"],
    "propagation": ["policies", "budgets", "selection"],
    "method": ["propagation", "schedules"],
    "presets": [],
    "methods": ["method", "presets"],
    "settings": ["methods"],
    "catalog": ["settings"],
    "kernels": ["types", "errors"],
    "cache": ["kernels", "files"],
    "engine": ["cache", "settings", "prompts"],
    "hf": ["engine", "version"],
    "documents": ["spans"],
    "prompts": ["documents"],
    "answers": ["hf", "prompts", "ranges"],
    "tasks": ["documents", "files"],
    "bench": ["answers", "tasks", "statistics", "report", "records"],
    "report": ["statistics", "records"],
    "analysis": ["errors", "files"],
    "harness": ["answers"],
    "cli": ["bench", "catalog", "report", "analysis", "harness"],
    "__init__": ["answers"],
    "__main__": ["cli"],
}
ONLY_IN = {
    "transformers": {"hf"},
    "huggingface_hub": {"hf", "tasks"},
    "typer": {"cli"},
    "rich": {"cli"},
    "gguf": {"hf"},
    "matplotlib": {"analysis"},
    "triton": {"kernels"},
    "kvpress": {"bench"},
    "ray": {"bench"},
    "datasets": {"tasks"},
    "rouge": {"tasks"},
    "rapidfuzz": {"tasks"},
    "lm_eval": {"harness"},
}
FILES = sorted(ROOT.rglob("*.py"))


def room_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def reachable(room):
    found = {room}
    for nearer in ARROWS[room]:
        found |= reachable(nearer)
    return found


def imported(path):
    """(module, is it imported while type checking only) for every import of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    room = room_of(path)
    for module in imported(path):
        top, _, rest = module.partition(".")
        assert room in ONLY_IN.get(top, {room}), f"{module} belongs to {ONLY_IN[top]}"
        if top == "kvtrim" and rest:
            assert rest.partition(".")[0] in reachable(room), f"{room} may not import {module}"


def test_optimised_kernels_do_not_import_the_reference():
    for path in (ROOT / "kernels").glob("*.py"):
        assert "kvtrim.kernels.reference" not in set(imported(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short(path):
    """A guide: one idea stays in one file, and a long file is looked at again."""
    assert path.read_text().count("\n") <= 400, "split it by idea"
