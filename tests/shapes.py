"""Types and tensor shapes of kvtrim, checked at every call while the tests run.

beartype checks the calls of a function, and is made ready at the first: most processes call few.
What a jaxtyping annotation says of a tensor is checked by `Shape`, several times as fast as by
jaxtyping; tests/test_shapes.py compares the two. Generators with shapes are not checked.
"""

import ast
import dataclasses
import functools
import inspect
import operator
import sys
import threading
import types
import typing
from collections.abc import Callable, Collection
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader

import jaxtyping
from beartype import BeartypeConf, beartype

NAME, EDITION = "__checked__", "shapes1"  # another edition where what is compiled changes
_strictly = beartype(conf=BeartypeConf(violation_type=TypeError))


class _Calls(threading.local):
    letters: dict | None = None  # what they stand for in this thread's innermost call


_calls = _Calls()
_NUMBERS = {}  # what every call begins with: numbers stand for themselves


class Shape(type):
    """A class whose instances are the tensors of some types and one shape.

    A letter stands for one size within a call, `*letters` for several, `...` for any.
    """

    def __new__(meta, hint):
        return super().__new__(meta, hint.__name__, (), {})

    def __init__(cls, hint):
        import torch

        cls.tensor = hint.array_type
        cls.kinds = {getattr(torch, name, None) for name in hint.dtypes} - {None}
        dims = [int(dim) if dim.isdigit() else dim for dim in hint.dim_str.split()]
        many = [at for at, dim in enumerate(dims) if dim == "..." or str(dim)[0] == "*"]
        names = {dim.removeprefix("*") for dim in dims if isinstance(dim, str) and dim != "..."}
        if len(many) > 1 or not all(name.isidentifier() and name[0] != "_" for name in names):
            raise TypeError(f"{hint} says more than tests/shapes.py understands")
        cls.cut = many[0] if many else None
        cls.rest = dims.pop(many[0]) if many else None
        cls.dims = dims
        _NUMBERS.update((dim, dim) for dim in dims if isinstance(dim, int))

    def __instancecheck__(cls, value):
        if not isinstance(value, cls.tensor) or value.dtype not in cls.kinds:
            return False
        sizes, dims = value.shape, cls.dims
        if cls.rest is not None:
            cut, end = cls.cut, cls.cut + len(sizes) - len(dims)
            if end < cut:
                return False
            within, sizes = tuple(sizes[cut:end]), (*sizes[:cut], *sizes[end:])
            if cls.rest != "...":  # one more letter, which stands for sizes
                sizes, dims = (*sizes, within), (*dims, cls.rest)
        elif len(sizes) != len(dims):
            return False
        letters, bound = _calls.letters, []
        if letters is None:
            letters = _NUMBERS.copy()
        for dim, size in zip(dims, sizes, strict=True):
            known = letters.get(dim)
            if known is None:
                letters[dim] = size
                bound.append(dim)
            elif known != size:
                for each in bound:
                    del letters[each]
                return False
        return True


_SHAPES = {}


def _faster(hint, names, met):
    """A hint with a `Shape` for every class of jaxtyping in it, which are put into `met`."""

    def each(inner):
        return _faster(inner, names, met)

    if isinstance(hint, typing.ForwardRef):
        return each(hint.__forward_arg__)
    if isinstance(hint, str):
        try:
            return each(eval(hint, names))
        except (NameError, TypeError):  # known to a type checker only
            return typing.ForwardRef(hint)
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        key = (hint.array_type, hint.dtype, hint.dim_str)
        made = _SHAPES[key] = _SHAPES.get(key) or Shape(hint)
        met.append(made)
        return made
    origin, within = typing.get_origin(hint), typing.get_args(hint)
    if not within or origin in (typing.Literal, typing.Annotated, Callable):
        return hint
    if origin in (types.UnionType, typing.Union):
        return functools.reduce(operator.or_, map(each, within))
    within = tuple(part if part is ... else each(part) for part in within)
    return hint.copy_with(within) if hasattr(hint, "copy_with") else origin[within]


def _ready(made):
    """A function whose calls are checked, and the shapes that it names."""
    met = []
    hints = {
        name: _faster(hint, made.__globals__, met) for name, hint in made.__annotations__.items()
    }
    if met and inspect.isgeneratorfunction(made):  # it runs among its caller's letters
        return made, []
    code = made.__code__, made.__globals__, made.__name__, made.__defaults__, made.__closure__
    copy = functools.update_wrapper(types.FunctionType(*code), made)
    del copy.__wrapped__
    copy.__kwdefaults__, copy.__annotations__ = made.__kwdefaults__, hints
    return _strictly(copy), met


def checked(made):
    """A function, or a dataclass, whose calls are checked."""
    if isinstance(made, type):
        if dataclasses.is_dataclass(made) and "__init__" in vars(made):
            made.__init__ = checked(made.__init__)
        return made
    if not made.__annotations__:
        return made
    if inspect.iscoroutinefunction(made) or inspect.isasyncgenfunction(made):
        return _strictly(made)  # without letters: others run before it ends
    strict = shapes = None

    @functools.wraps(made)
    def call(*args, **kwargs):
        nonlocal strict, shapes
        if strict is None:
            shapes, strict = _ready(made)[::-1]
        if not shapes:
            return strict(*args, **kwargs)
        outer, _calls.letters = _calls.letters, _NUMBERS.copy()
        try:
            return strict(*args, **kwargs)
        finally:
            _calls.letters = outer

    return call


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
