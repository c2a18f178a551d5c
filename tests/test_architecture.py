"""The rooms of docs/design.md, read off the code. `rooms.py` holds the table."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter

import pytest

import rooms
from rooms import FILES, MODULES, ROOMS, ROOT

OWNERS = {}
for place, line in ROOMS.items():
    for package in line.owns.split():
        OWNERS.setdefault(package, set()).add(place)


def test_imports_follow_the_arrows():
    wrong = []
    for path in FILES:
        room = rooms.room_of(rooms.module_of(path))
        for name, now in rooms.imports(path):
            top, module = name.partition(".")[0], rooms.ours(name)
            if room not in OWNERS.get(top, {room}):
                wrong.append(f"{path}: {top} belongs to {OWNERS[top]}")
            if module is None or (room == "" and not now):
                continue
            if rooms.room_of(module) not in {room, *ROOMS[room].may.split()}:
                wrong.append(f"{path}: {room} may not import {module}")
    assert not wrong, "\n".join(wrong)


def test_every_line_of_the_table_is_needed():
    lived_in = {rooms.room_of(module) for module in MODULES}
    assert lived_in == set(ROOMS), "a room with nothing in it"
    arrows = {(room, other) for room, line in ROOMS.items() for other in line.may.split()}
    assert {(room, other) for room, other in arrows if other not in ROOMS} == set()


def test_there_are_no_circles():
    """Inside rooms as well as between them, later imports and those for annotations too."""
    graph = {
        module: {rooms.ours(name) for name, _ in rooms.imports(path)} - {None, module}
        for module, path in MODULES.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_rooms_know_only_what_lies_below():
    """Later imports too; a room and the rooms within it count as one."""
    graph = {}
    for room, line in ROOMS.items():
        home = room if room.startswith("methods.") else room.partition(".")[0]
        nearer = {r if r.startswith("methods.") else r.partition(".")[0] for r in line.may.split()}
        graph.setdefault(home, set()).update(nearer - {home})
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_the_plan_shows_every_room():
    text = (ROOT.parents[1] / "docs" / "design.md").read_text()
    plan = text.partition("## Rooms\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"[a-z_]+", plan))
    missing = {room for room in ROOMS if room and room.rpartition(".")[2].strip("_") not in named}
    assert missing - {"__main__"} == set()


def test_the_house_has_few_doors():
    entries = [p for p in ROOT.iterdir() if p.name not in ("__pycache__", "py.typed")]
    assert len(entries) <= 22, sorted(p.name for p in entries)


def test_shapes_are_checked_wherever_tensors_have_them():
    for module, path in MODULES.items():
        room = ROOMS[rooms.room_of(module)]
        says = any(
            name.startswith(("kvtrim.types.", "jaxtyping."))
            and name.rpartition(".")[2] in {"Float", "Int", "Bool", "Scores", "Counts", "Kept"}
            for name, _ in rooms.imports(path)
        )
        unchecked = not module or module.startswith("bench")  # measures from outside
        assert not says or room.shapes or unchecked, f"{module} stands in a room without checks"


def test_the_shape_checks_are_on():
    import torch

    from kvtrim.cache.store import starts_of

    with pytest.raises(TypeError, match="capacity"):
        starts_of(torch.zeros(2))  # floats


LOAD = """
import importlib, json, sys, traceback
sys.modules["torch"] = None
failed = {}
for room, modules in json.load(sys.stdin).items():
    for name in [name for name in sys.modules if name.partition(".")[0] == "kvtrim"]:
        del sys.modules[name]
    try:
        for module in modules:
            importlib.import_module(module)
    except Exception:
        failed[room] = traceback.format_exc()
print(json.dumps(failed))
"""


@pytest.fixture(scope="module")
def needing_torch():
    """Rooms that do not load where there is no torch, each loaded anew."""
    free = {room: ["kvtrim"] for room, line in ROOMS.items() if not line.torch}
    for module in MODULES:
        if module and not module.endswith("__main__") and rooms.room_of(module) in free:
            free[rooms.room_of(module)].append(f"kvtrim.{module}")
    run = [sys.executable, "-c", LOAD]
    done = subprocess.run(run, input=json.dumps(free), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("room", [room for room, line in ROOMS.items() if not line.torch])
def test_loads_without_torch(needing_torch, room):
    assert room not in needing_torch, needing_torch[room]


def test_the_linter_spares_rooms_that_exist():
    settings = tomllib.loads((ROOT.parents[1] / "pyproject.toml").read_text())
    ignores = settings["tool"]["ruff"]["lint"]["per-file-ignores"]
    for pattern in ignores:
        if pattern.startswith("src/"):
            braces = pattern.partition("{")[2].partition("}")[0]
            for one in braces.split(",") if braces else [""]:
                plain = pattern.replace("{" + braces + "}", one) if braces else pattern
                assert list(ROOT.parents[1].glob(plain)), plain


def test_optimised_kernels_do_not_import_the_reference():
    optimised = set((ROOT / "kernels").glob("*.py")) - {ROOT / "kernels" / "attend.py"}  # chooses
    for path in optimised:
        assert all(rooms.ours(name) != "kernels.reference" for name, _ in rooms.imports(path))


def test_files_stay_short():
    long = [path for path in FILES if path.read_text().count("\n") > 400]
    assert not long, "split them by idea"


# what only ends like a participle or gerund: verbs, and nouns and adjectives of the field (hidden
# states, padding, ragged slots, sampling)
PLAIN = {"embed", "feed", "read", "seed", "shed", "speed", "spread", "string"}
PLAIN |= {"hidden", "padding", "ragged", "sampling"}
# hooks that methods of other packages define, and those that transformers and Ray Serve call
FOREIGN = {"fitted", "compared", "activate_past_recording", "_weighed", "on_request_routed"}
IRREGULAR = """
begun bought broken brought built caught chosen dealt done drawn driven fed felt forgotten
foreseen found frozen given gone got grown heard held kept known laid led left lent lost made
meant met paid proven risen said seen sent shown sold sought spent spoken stolen stood stuck sunk
sworn taken taught thrown told torn understood won worn woven written
""".split()


def acts(name):
    """Whether a function's name says what it does or gives, not what was done or is going on."""
    last = name.strip("_").rpartition("_")[2]
    if name in FOREIGN or last in PLAIN or name.strip("_").startswith(("is_", "require_")):
        return True
    return not last.endswith(("ed", "ing")) and last not in IRREGULAR


def test_functions_are_named_for_what_they_do():
    """No past participles and no gerunds; properties say what something is."""
    defined, wrong = (ast.FunctionDef, ast.AsyncFunctionDef), []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, defined) and not acts(node.name):
                if "property" not in " ".join(map(ast.unparse, node.decorator_list)):
                    wrong.append(f"{path}:{node.lineno}: {node.name}")
    assert not wrong, "\n".join(wrong)
