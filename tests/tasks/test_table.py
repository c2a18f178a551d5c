"""The table of benchmarks: complete, named as it should be, current in docs/tasks.md."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvtrim.errors import UnknownNameError
from kvtrim.tasks import GROUPS, TASKS, find_tasks
from kvtrim.tasks.manual import manual
from kvtrim.tasks.sources import SOURCES

PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"


@pytest.mark.parametrize("name", TASKS)
def test_every_task_says_what_it_asks_and_whom_it_follows(name):
    task = TASKS[name]
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
    assert task.name == name and task.version >= 1 and task.max_new_tokens > 0
    assert task.about.endswith(".") and len(task.about) <= 100
    assert task.source and task.metric and set(task.data) <= SOURCES.keys()


def test_groups_hold_tasks_and_have_names_of_their_own():
    assert not GROUPS.keys() & TASKS.keys()
    assert {name for of in GROUPS.values() for name in of} <= TASKS.keys()
    counts = {name: len(of) for name, of in GROUPS.items()}
    assert counts["longbench"] == 16 and counts["needles"] == 4
    assert counts["ruler"] == 13 and counts["ruler-offline"] == 11


def test_tasks_by_name_and_by_group():
    asked = ["ruler-vt", "needles", "niah", "ruler-offline"]
    found = [task.name for task in find_tasks(asked)]
    assert found[:5] == ["ruler-vt", *GROUPS["needles"]]
    assert len(found) == len(set(found)) == 4 + 11
    assert find_tasks([]) == []


def test_a_name_nobody_knows():
    with pytest.raises(UnknownNameError, match="unknown task 'ruler-vd'; did you mean 'ruler-vt'"):
        find_tasks(["ruler-vd"])
    with pytest.raises(UnknownNameError, match="longbench"):
        find_tasks(["longbenhc"])


def test_the_page_of_tasks_is_current():
    assert PAGE.read_text(encoding="utf-8") == manual(), "docs/tasks.md is stale: run `make docs`"


def test_the_page_is_printed():
    run = [sys.executable, "-m", "kvtrim.tasks"]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == manual()


def test_the_table_needs_no_package_beyond_the_base():
    """Scorers, words and the Hub are imported when they are used."""
    code = (
        "import sys; import kvtrim.tasks; "
        "sys.exit(any(name in sys.modules for name in "
        "('datasets', 'rouge', 'rapidfuzz', 'wonderwords', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
