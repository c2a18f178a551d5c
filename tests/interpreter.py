"""Triton's interpreter, which looks through its language at every call, made to look once."""

import functools
import inspect
import sys


def quicken():
    """Remember which names of the language's modules and classes are functions of Triton's own."""
    if "triton.runtime.interpreter" not in sys.modules:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    @functools.cache
    def names(package):
        return [name for name, one in inspect.getmembers(package) if tl.core.is_builtin(one)]

    def patch(package, builder, scope):
        for name in names(package):
            member = getattr(package, name)
            if tl.core.is_builtin(member):  # else it is replaced already
                interpreter._patch_attr(package, name, member, builder, scope)

    known = list(inspect.signature(interpreter._patch_builtin).parameters)
    if known == ["pkg", "builder", "scope"]:  # of Triton 3.7 and earlier ones
        for package in (tl, tl.core, tl.math, tl.tensor):  # while nothing is replaced
            names(package)
        interpreter._patch_builtin = patch
