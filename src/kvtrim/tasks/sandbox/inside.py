"""What runs inside the two processes that `sandbox` starts: a program, and the tests of it.

Started as a script, with nothing of kvtrim: `inside.py answer LIMITS` holds the program, which
is not trusted; `inside.py test LIMITS JOB` holds the tests, and asks the other one, over pipes,
for what it needs: to run the program, what a name is, what a call returns. Only plain values
travel, so that nothing the program makes up can act in the tests.
"""

import ast
import builtins
import json
import os
import sys
from contextlib import suppress
from types import ModuleType
from typing import Any

PLAIN: dict[str, Any] = {kind.__name__: kind for kind in (list, tuple, set, frozenset)}
NOBODY = 65534
MOST = 1 << 24  # bytes of a message


class Ended(Exception):
    """The other process is gone."""


class Raised(Exception):
    """The program raised something."""


def leave_root() -> None:
    """Become nobody where this is root, in a shell that only root can make."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        os.stat(os.__file__)  # the rest of Python has to be found as nobody too


def limit(limits: dict[str, Any]) -> None:
    """Limits of the system, as far as it has them."""
    if limits["leave_root"]:
        leave_root()
    try:
        import resource
    except ImportError:  # Windows
        return
    for name, most in (
        ("RLIMIT_CPU", limits["cpu_s"]),
        ("RLIMIT_AS", limits["memory_bytes"]),
        ("RLIMIT_FSIZE", limits["file_bytes"]),
        ("RLIMIT_NOFILE", limits["open_files"]),
        ("RLIMIT_NPROC", limits["processes"]),
        ("RLIMIT_CORE", 0),
    ):
        with suppress(AttributeError, ValueError, OSError):
            hard = most + (name == "RLIMIT_CPU")  # a second for the signal to say why
            resource.setrlimit(getattr(resource, name), (most, hard))


def encode(value: Any) -> Any:
    """A plain value as JSON has it, with its type; subclasses as what they are of."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return {"int": int.__repr__(value)}
    if isinstance(value, float):
        return {"float": float.__repr__(value)}
    if isinstance(value, complex):
        return {"complex": [float(value.real).hex(), float(value.imag).hex()]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(each)] for key, each in dict.items(value)]}
    for name, kind in PLAIN.items():
        if isinstance(value, kind):
            return {name: [encode(each) for each in kind.__iter__(value)]}
    raise TypeError(f"{type(value).__name__} is no plain value")


def decode(given: Any) -> Any:
    """The value again."""
    if not isinstance(given, dict):
        return given
    ((name, inside),) = given.items()
    if name in PLAIN:
        return PLAIN[name](decode(each) for each in inside)
    if name == "dict":
        return {decode(key): decode(each) for key, each in inside}
    if name == "complex":
        return complex(*map(float.fromhex, inside))
    return bytes.fromhex(inside) if name == "bytes" else {"int": int, "float": float}[name](inside)


class Line:
    """Messages to and from the other process."""

    def __init__(self, read: int, write: int):
        self._read, self._write = os.fdopen(read, "rb"), write

    def say(self, message: dict[str, Any]) -> None:
        """Send one."""
        data = json.dumps(message).encode() + b"\n"
        try:
            while data:
                data = data[os.write(self._write, data) :]
        except OSError:
            raise Ended from None

    def hear(self) -> dict[str, Any]:
        """Wait for one."""
        data = self._read.readline(MOST)
        if not data.endswith(b"\n"):
            raise Ended
        found = json.loads(data)
        return found if isinstance(found, dict) else {}

    def ask(self, **message: Any) -> dict[str, Any]:
        """Send one and wait for the reply; what the program raised is raised here."""
        self.say(message)
        reply = self.hear()
        if "raised" in reply:
            name = str(reply["raised"])[:100]
            kind = getattr(builtins, name, None)
            error: Exception = Raised(name)
            if isinstance(kind, type) and issubclass(kind, Exception):
                with suppress(TypeError):  # a few take more arguments
                    error = kind("raised by the program")
            raise error
        return reply


def answer(limits: dict[str, Any]) -> None:
    """Hold the program, and do what the tests ask for."""
    line, nothing = Line(os.dup(0), os.dup(1)), os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.close(nothing)
    module = ModuleType("program")
    sys.modules["program"] = module
    space = module.__dict__
    limit(limits)
    while True:
        asked = line.hear()
        try:
            if "program" in asked:
                exec(compile(asked["program"], "program", "exec"), space)
                reply: dict[str, Any] = {"done": True}
            elif "name" in asked:
                found = space[asked["name"]]
                reply = {"calls": True} if callable(found) else {"value": encode(found)}
            else:
                arguments, named = decode(asked["arguments"]), decode(asked["named"])
                reply = {"value": encode(space[asked["call"]](*arguments, **named))}
        except BaseException as error:  # SystemExit is no result either
            reply = {"raised": type(error).__name__}
        line.say(reply)


def test(limits: dict[str, Any], job: str) -> None:
    """Run the tests; the verdict is the exit status, with a word on standard error."""
    with open(job, encoding="utf-8") as file:
        given = json.load(file)
    line = Line(os.dup(0), os.dup(1))
    limit(limits)
    try:
        space: dict[str, Any] = {"__name__": "tests"}
        line.ask(program=given["program"])
        tree = ast.parse(given["tests"])
        if given["known"]:
            exec(compile(given["known"], "known", "exec"), space)
        for name in sorted({given["entry"], *_missing_names(tree)} - {""}):
            if name == given["entry"] or name not in space:
                with suppress(KeyError):
                    space[name] = _ask(line, name)
        exec(compile(tree, "tests", "exec"), space)
    except Ended:
        os._exit(3)
    except BaseException as error:
        name = str(error) if isinstance(error, Raised) else type(error).__name__
        os.write(2, name.encode("ascii", "replace")[:100])
        os._exit(1)
    os._exit(0)


def _missing_names(tree: ast.AST) -> set[str]:
    """Names that tests use and do not make."""
    used, made = set(), set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else made).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            made.add(node.name)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
        elif isinstance(node, ast.alias):
            made.add((node.asname or node.name).partition(".")[0])
    return used - made


def _ask(line: Line, name: str) -> Any:
    """What the program calls by a name: its value, or a function that asks for calls of it."""
    reply = line.ask(name=name)
    if "value" in reply:
        return decode(reply["value"])

    def call(*arguments: Any, **named: Any) -> Any:
        asked = {"arguments": encode(arguments), "named": encode(named)}
        return decode(line.ask(call=name, **asked)["value"])

    return call


if __name__ == "__main__":
    if sys.argv[1] == "start":  # as far as the tests would come
        leave_root()
    elif sys.argv[1] == "answer":
        with suppress(Ended):
            answer(json.loads(sys.argv[2]))
    else:
        test(json.loads(sys.argv[2]), sys.argv[3])
