"""Modules that have moved are found under their old names for a version, and say so."""

import importlib
import subprocess
import sys

import pytest

from kvtrim import moved

OLD = [
    *moved.MODULES,
    "kvtrim.policies.base",
    "kvtrim.policies.knorm",
    "kvtrim.budgets.per_head",
    "kvtrim.catalog.entries",
]


@pytest.fixture(autouse=True)
def anew():
    """Every test imports the old names for the first time."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if moved.place(name):
            del sys.modules[name]


@pytest.mark.parametrize("old", OLD)
def test_an_old_name_is_the_same_module_and_warns(old):
    now = importlib.import_module(moved.place(old))
    spec = now.__spec__
    with pytest.warns(DeprecationWarning) as heard:
        found = importlib.import_module(old)
    assert found is now
    assert (now.__name__, now.__spec__) == (moved.place(old), spec)
    assert str(heard[-1].message).startswith(f"{old} is {moved.place(old)} now")


def test_classes_are_the_same_under_both_names():
    from kvtrim.methods.policies.base import Policy

    with pytest.warns(DeprecationWarning, match="policies"):
        from kvtrim.policies.base import Policy as Old
    assert Old is Policy


@pytest.mark.parametrize("package", moved.NAMES)
def test_names_that_left_a_package_are_found_there(package):
    for name, home in moved.NAMES[package].items():
        with pytest.warns(DeprecationWarning, match=f"{package}.{name} is {home}.{name} now"):
            found = getattr(importlib.import_module(package), name)
        assert found is getattr(importlib.import_module(home), name)


def test_the_warning_points_at_the_import(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text("import kvtrim\n\nfrom kvtrim.analysis.style import styles\n")
    done = subprocess.run([sys.executable, "-Wd", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "DeprecationWarning" in line]
    assert all(f"{script}:3:" in line for line in lines), done.stderr
    assert len(lines) == 2  # the package and the module


def test_a_name_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError), pytest.warns(DeprecationWarning):
        importlib.import_module("kvtrim.policies.nobody")
    with pytest.raises(AttributeError, match="nobody"):
        importlib.import_module("kvtrim.methods").nobody  # noqa: B018


def test_looking_for_old_names_loads_no_torch():
    code = "import sys, kvtrim.moved; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
