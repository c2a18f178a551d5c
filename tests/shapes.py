"""Types and tensor shapes of kvtrim, checked at every call while the tests run.

jaxtyping's own import hook checks the arguments of every call twice, and of functions without
shapes too, which was most of what the suite cost. Here beartype checks a call once, and only a
function that names shapes gives their letters a scope. Generators with shapes are not checked.
"""

import ast
import dataclasses
import functools
import inspect
import sys
import typing
from collections.abc import Collection
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader

import jaxtyping
from beartype import BeartypeConf, beartype

NAME, EDITION = "__checked__", "shapes1"  # another edition where what is compiled changes
_SCOPE = jaxtyping.jaxtyped("context")
_strictly = beartype(conf=BeartypeConf(violation_type=TypeError))


def checked(made):
    """A function, or a dataclass, whose calls are checked."""
    if isinstance(made, type):
        if dataclasses.is_dataclass(made) and "__init__" in vars(made):
            made.__init__ = checked(made.__init__)
        return made
    if not made.__annotations__:
        return made
    strict, shaped = _strictly(made), any(map(_shaped, made.__annotations__.values()))
    if not shaped:
        return strict
    if inspect.isgeneratorfunction(made):  # it runs among its caller's letters, which are others
        return made

    @functools.wraps(made)
    def scoped(*args, **kwargs):
        with _SCOPE:
            return strict(*args, **kwargs)

    return scoped


def _shaped(hint):
    """Does it name a shape? What is only a string may."""
    if isinstance(hint, str | typing.ForwardRef):
        return True
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    within = hint if isinstance(hint, list) else typing.get_args(hint)
    return any(map(_shaped, within))


class _Decorated(ast.NodeTransformer):
    """`checked` around classes, methods and functions; of inner functions, those with shapes."""

    within = 0  # how many functions

    def visit_ClassDef(self, node):
        self.generic_visit(node)
        node.decorator_list.insert(0, _name(node))  # after @dataclass
        return node

    def visit_FunctionDef(self, node):
        self.within += 1
        self.generic_visit(node)
        self.within -= 1
        signature = ast.unparse(node.args) + (ast.unparse(node.returns) if node.returns else "")
        if not self.within or "[Tensor, " in signature:
            node.decorator_list.append(_name(node))  # before any other
        return node


def _name(node):
    return ast.copy_location(ast.Name(NAME, ast.Load()), node)


class _Loader(SourceFileLoader):
    def source_to_code(self, data, path, **options):
        tree = ast.fix_missing_locations(_Decorated().visit(ast.parse(data, path)))
        return compile(tree, path, "exec", dont_inherit=True)

    def exec_module(self, module):
        vars(module)[NAME] = checked
        super().exec_module(module)

    # compiled beside what is compiled without checks

    def get_data(self, path):
        return super().get_data(_own(path))

    def set_data(self, path, data, **options):
        super().set_data(_own(path), data, **options)


def _own(path):
    return path.removesuffix(".pyc") + f".{EDITION}.pyc" if path.endswith(".pyc") else path


class _Finder(MetaPathFinder):
    def __init__(self, modules):
        self.modules = modules

    def find_spec(self, fullname, path, target=None):
        if fullname not in self.modules:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(fullname, spec.origin)
        return spec


def check(modules: Collection[str]) -> None:
    """Check what these modules define; call before any of them is loaded."""
    sys.meta_path.insert(0, _Finder(frozenset(modules)))
