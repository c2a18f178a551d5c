"""The rooms of src/kvtrim, one line each; whatever has to know the rooms reads this table."""

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1] / "src" / "kvtrim"


@dataclass(frozen=True)
class Room:
    """A file or folder of src/kvtrim: whatever lies below it belongs to it, new files too."""

    may: str = ""  # the other rooms that it may import
    owns: str = ""  # third-party packages that it may import
    shapes: bool = False  # tensors say their shapes, which are checked while the tests run
    torch: bool = True  # may loading it load torch?


_BENCH = (
    "api bench errors files hf hf.models methods.keep methods.method methods.request "
    "methods.settings methods.variant prompts "
)
_BENCH += "prompts.spans records types"
ROOMS = {
    "": Room("moved errors version", torch=False),  # and lazily the public names
    "__main__": Room("cli", torch=False),
    "moved": Room(torch=False),
    "version": Room(torch=False),
    "errors": Room(torch=False),
    "files": Room("errors", torch=False),
    "records": Room("errors files", torch=False),
    "prompts.spans": Room("errors", torch=False),
    "prompts": Room("errors prompts.spans", owns="jinja2", torch=False),
    "types": Room("prompts.spans", shapes=True),
    "kernels": Room("errors kernels.programs types", owns="triton", shapes=True),
    "kernels.programs": Room(owns="triton"),  # Triton's language, whose sources it reads itself
    "cache": Room("errors files kernels types", owns="safetensors", shapes=True),
    "methods": Room("moved", torch=False),
    "methods.entry_points": Room("errors", torch=False),
    "methods.keep": Room("errors", torch=False),
    "methods.ranges": Room("errors", torch=False),
    "methods.variant": Room("errors", torch=False),
    "methods.echo_tables": Room("errors files types", owns="safetensors", shapes=True),
    "methods.schedule": Room("errors methods.ranges", torch=False),
    "methods.unit_numbers": Room("types", shapes=True),
    "methods.demotion": Room("errors methods.unit_numbers prompts.spans types", shapes=True),
    "methods.unit": Room("errors methods.ranges methods.unit_numbers types", shapes=True),
    "methods.selection": Room("errors methods.unit types", shapes=True),
    "methods.policies": Room(
        "errors kernels methods.echo_tables methods.ranges methods.unit_numbers types",
        shapes=True,
    ),
    "methods.budgets": Room("errors files methods.ranges methods.unit moved types", shapes=True),
    "methods.propagation": Room(
        "errors methods.budgets methods.policies methods.ranges methods.selection types",
        shapes=True,
    ),
    "methods.refit": Room("errors kernels methods.ranges types", shapes=True),
    "methods.method": Room(
        "errors methods.budgets methods.keep methods.policies methods.propagation methods.ranges "
        "methods.refit methods.schedule methods.unit types",
        shapes=True,
    ),
    "methods.request": Room("errors methods.keep methods.method methods.settings"),
    "methods.registry": Room(
        "methods.budgets methods.method methods.policies methods.propagation "
        "methods.schedule methods.unit"
    ),
    "methods.auto": Room(
        "errors methods.budgets methods.echo_tables methods.method methods.policies "
        "methods.refit methods.registry methods.variant types",
        shapes=True,
    ),
    "methods.settings": Room(
        "errors methods.auto methods.budgets methods.entry_points methods.method methods.policies "
        "methods.propagation methods.ranges methods.refit methods.registry methods.schedule "
        "methods.unit methods.variant"
    ),
    "methods.describe": Room(
        "methods.auto methods.budgets methods.method methods.policies methods.propagation "
        "methods.refit methods.registry methods.schedule methods.settings methods.unit "
        "report.format"
    ),
    "engine": Room(
        "cache errors kernels methods.auto methods.budgets methods.demotion methods.keep "
        "methods.method methods.policies methods.refit methods.selection methods.settings "
        "prompts prompts.spans types",
        shapes=True,
    ),
    "hf": Room(
        "cache engine errors hf.models kernels methods.auto methods.keep methods.method "
        "methods.ranges methods.registry methods.request prompts prompts.spans report.viewer "
        "types version",
        owns="transformers",
        shapes=True,
    ),
    "hf.models": Room(
        "errors files hf methods.policies types",
        owns="transformers huggingface_hub gguf accelerate",
        shapes=True,
    ),
    "api": Room(
        "errors hf hf.models methods.method methods.ranges methods.request methods.settings "
        "prompts"
    ),
    "tasks": Room(
        "errors files methods.entry_points prompts report.format tasks.ruler tasks.sandbox",
        owns="huggingface_hub datasets rouge rapidfuzz wonderwords",
        torch=False,
    ),
    "tasks.ruler": Room("errors prompts tasks", owns="wonderwords", torch=False),
    "tasks.sandbox": Room("errors", torch=False),
    "papers": Room("errors files methods.variant records", torch=False),
    "report": Room(
        "errors files methods.keep methods.variant papers records report.format", torch=False
    ),
    "report.format": Room(torch=False),
    "report.viewer": Room("errors files report report.format", torch=False),
    "report.rank_tests": Room("errors report", owns="scipy", torch=False),
    "report.plots": Room("errors files", owns="matplotlib", torch=False),
    "bench": Room(f"{_BENCH} bench.eval report report.viewer tasks version"),
    "bench.eval": Room(f"{_BENCH} report report.format tasks tasks.sandbox"),
    "bench.analyses": Room(
        f"{_BENCH} bench.calibrate bench.eval methods.policies report report.rank_tests tasks",
        owns="sklearn",
    ),
    "bench.sweep": Room(f"{_BENCH} bench.eval tasks", owns="ray"),
    "bench.speed": Room(_BENCH, owns="kvpress"),
    "bench.calibrate": Room(
        f"{_BENCH} engine methods.budgets methods.echo_tables methods.policies "
        "methods.propagation tasks",
        owns="safetensors",
    ),
    "serve": Room(
        "api cache engine errors files hf hf.models methods.ranges methods.request "
        "methods.settings prompts report.format report.viewer serve.library serve.stream types",
        owns="fastapi starlette pydantic prometheus_client llm ray",
        shapes=True,
    ),
    "serve.library": Room("errors files", owns="platformdirs", torch=False),
    "serve.stream": Room("prompts", torch=False),
    "lm_eval": Room("errors hf hf.models methods.settings version", owns="lm_eval"),
    "cli": Room(
        "api bench bench.analyses bench.calibrate bench.eval bench.speed bench.sweep engine "
        "errors files hf hf.models lm_eval methods.budgets methods.describe methods.echo_tables "
        "methods.keep methods.method methods.ranges methods.registry methods.request "
        "methods.settings prompts papers records report report.format report.plots report.viewer "
        "serve serve.library serve.stream tasks version",
        owns="typer rich uvicorn prompt_toolkit",
    ),
}
FILES = sorted(ROOT.rglob("*.py"))


def module_of(path):
    """`hf.cache` for src/kvtrim/hf/cache.py; a package is its own `__init__`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def room_of(module):
    """The nearest room around a module; KeyError if it stands in none."""
    while module not in ROOMS:
        if "." not in module:
            raise KeyError(module)
        module = module.rpartition(".")[0]
    return module


def shaped():
    """The modules whose shapes are checked by their full names; a package would take all along."""
    named = [name for name, path in MODULES.items() if path.name != "__init__.py"]
    return [f"kvtrim.{name}" for name in named if ROOMS[room_of(name)].shapes]


@cache
def imports(path):
    """(module or module.name, is it imported when the file is) for every import of a file."""

    def within(node, now):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                continue  # no statement stands in it
            if isinstance(child, ast.Import):
                yield from ((alias.name, now) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                yield from ((f"{child.module}.{alias.name}", now) for alias in child.names)
            typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from within(child, now and not typing and not isinstance(child, ast.FunctionDef))

    return tuple(within(ast.parse(path.read_text()), True))


def ours(name):
    """`hf.cache` for kvtrim.hf.cache and for kvtrim.hf.cache.Cache; None if it is not ours."""
    top, _, rest = name.partition(".")
    while top == "kvtrim" and rest and rest not in MODULES:
        rest = rest.rpartition(".")[0]
    return rest if top == "kvtrim" else None
