"""Old names of modules, which go on working for one version: the same modules, with a warning."""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MODULES = {
    "kvtrim.analysis": "kvtrim.report.plots",
    "kvtrim.answers": "kvtrim.api",
    "kvtrim.bench.book": "kvtrim.records.run_folder",
    "kvtrim.bench.derived": "kvtrim.bench.eval.scores",
    "kvtrim.bench.evaluate": "kvtrim.bench.eval.evaluate",
    "kvtrim.bench.grid": "kvtrim.bench.eval.grid",
    "kvtrim.bench.journal": "kvtrim.records.journal",
    "kvtrim.bench.machine": "kvtrim.bench.provenance",
    "kvtrim.bench.subjects": "kvtrim.bench.candidates",
    "kvtrim.budgets": "kvtrim.methods.budgets",
    "kvtrim.budgets.keep": "kvtrim.methods.keep",
    "kvtrim.cache.attend": "kvtrim.kernels.attend",
    "kvtrim.catalog": "kvtrim.methods.describe",
    "kvtrim.documents": "kvtrim.prompts.document",
    "kvtrim.engine.probe": "kvtrim.hf.probe",
    "kvtrim.harness": "kvtrim.lm_eval",
    "kvtrim.hf.architectures": "kvtrim.hf.models.architectures",
    "kvtrim.hf.checking": "kvtrim.hf.models.check",
    "kvtrim.hf.fingerprint": "kvtrim.hf.models.fingerprint",
    "kvtrim.hf.load": "kvtrim.hf.models.load",
    "kvtrim.hf.long_rope": "kvtrim.hf.rotary",
    "kvtrim.hf.running": "kvtrim.hf.generate",
    "kvtrim.hf.saving": "kvtrim.hf.cache",
    "kvtrim.method": "kvtrim.methods.method",
    "kvtrim.ops": "kvtrim.methods.policies.ops",
    "kvtrim.papers.manual": "kvtrim.report.papers_manual",
    "kvtrim.policies": "kvtrim.methods.policies",
    "kvtrim.projections": "kvtrim.methods.policies.output",
    "kvtrim.propagation": "kvtrim.methods.propagation",
    "kvtrim.schedules": "kvtrim.methods.schedule",
    "kvtrim.selection": "kvtrim.methods.selection",
    "kvtrim.settings": "kvtrim.methods.settings",
    "kvtrim.spans": "kvtrim.prompts.spans",
    "kvtrim.statistics": "kvtrim.report.statistics",
    "kvtrim.units": "kvtrim.methods.unit",
}
"""A module or package, and where it is now; what lies in a package moved with it."""
NAMES = {
    "kvtrim.methods": {"METHODS": "kvtrim.methods.registry", "Method": "kvtrim.methods.method"},
    "kvtrim.methods.budgets": {"Keep": "kvtrim.methods.keep"},
}
"""Names that a package of the same name no longer holds itself."""


def place(name: str) -> str | None:
    """The name that a module has now; None if it has not moved."""
    rest = ""
    while name:
        if name in MODULES:
            return MODULES[name] + rest
        name, dot, last = name.rpartition(".")
        rest = dot + last + rest
    return None


def attribute(module: str, name: str) -> object:
    """A name that left its module: `__getattr__` of that module.

    Raises:
        AttributeError: no such name was there.
    """
    home = NAMES.get(module, {}).get(name)
    if home is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    _warn(f"{module}.{name}", f"{home}.{name}")
    return getattr(import_module(home), name)


def install() -> None:
    """Let `import` find modules under their old names, too."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _warn(old: str, new: str) -> None:
    text = f"{old} is {new} now; the old name goes with the next version"
    warnings.warn(text, DeprecationWarning, stacklevel=3)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith("kvtrim.") or (new := place(fullname)) is None:
            return None
        module = import_module(new)
        _warn(fullname, new)
        return ModuleSpec(fullname, _Loader(module))


class _Loader(Loader):
    """Hands over a module that is imported already, and leaves it as it is."""

    def __init__(self, module: ModuleType):
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # `import` had put the spec of the old name there
