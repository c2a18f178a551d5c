"""Types and tensor shapes of kvtrim, checked at calls while the tests run.

beartype checks the calls of a function, and is made ready at the first: most processes call few.
Functions that name no shape are called a million times with the same types: the first calls of a
process speak for all. Those that name shapes are checked at the first calls of every test, and at
every so many later ones, of which each layer has some.
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
PLAIN = 50  # how many calls of a function without shapes are checked in a process
SHAPED, SPARSE = 4, 7  # of one with shapes: the first of a test, then one in so many
_strictly = beartype(conf=BeartypeConf(violation_type=TypeError))


class _Calls(threading.local):
    letters: dict | None = None  # what they stand for in this thread's innermost call


_calls = _Calls()
_test = 0  # how many a process has begun


def begin_test() -> None:
    """Check the next calls of every function."""
    global _test
    _test += 1


class Shape(type):
    """A class whose instances are the tensors of some types and one shape.

    A letter stands for one size within a call, `*letters` for several, `...` for any.
    """

    def __new__(meta, hint):
        return super().__new__(meta, hint.__name__, (), {})

    def __init__(cls, hint):
        dims = hint.dim_str.split()
        many = [at for at, dim in enumerate(dims) if dim == "..." or dim[0] == "*"]
        names = {dim.removeprefix("*") for dim in dims if dim != "..." and not dim.isdigit()}
        if len(many) > 1 or not all(name.isidentifier() and name[0] != "_" for name in names):
            raise TypeError(f"{hint} says more than tests/shapes.py understands")
        cls.fits = _compiled(hint, dims, *many)

    def __instancecheck__(cls, value):
        return cls.fits(value)


def _compiled(hint, dims, many=None):
    """A function: is a value such a tensor? Written out, since it runs millions of times."""
    import torch

    sizes = [f"size{at}" for at in range(len(dims))]
    lines = [
        "def fits(value):",
        "  if not isinstance(value, tensor) or value.dtype not in kinds: return False",
        "  shape, letters = value.shape, calls.letters",
        f"  if len(shape) {'!=' if many is None else '<'} {len(dims) - (many is not None)}: "
        "return False",
    ]
    if many is not None:
        sizes[many] = f"*{sizes[many]}"
    lines += [f"  [{', '.join(sizes)}] = shape", "  if letters is None: letters = {}"]
    places = {}
    for at, dim in enumerate(dims):
        if dim == "...":
            continue
        other = dim if dim.isdigit() else places.setdefault(dim, f"size{at}")
        if other == f"size{at}":
            other = f"letters.get({dim!r}, size{at})"
        lines.append(f"  if size{at} != {other}: return False")
    lines += [f"  letters[{dim!r}] = {size}" for dim, size in places.items()]
    kinds = {getattr(torch, name, None) for name in hint.dtypes} - {None}
    scope = {"tensor": hint.array_type, "kinds": kinds, "calls": _calls}
    exec("\n".join([*lines, "  return True"]), scope)
    return scope["fits"]


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
    left, test, calls = PLAIN, 0, 0

    @functools.wraps(made)
    def call(*args, **kwargs):
        nonlocal strict, shapes, left, test, calls
        if strict is None:
            shapes, strict = _ready(made)[::-1]
        if not shapes:
            if not left:
                return made(*args, **kwargs)
            left -= 1
            return strict(*args, **kwargs)
        if test != _test:
            test, calls = _test, 0
        calls += 1
        if calls > SHAPED and calls % SPARSE:
            return made(*args, **kwargs)
        outer, _calls.letters = _calls.letters, {}
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
