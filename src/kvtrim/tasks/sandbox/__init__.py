"""Running a program that a model wrote, shut away, and only if somebody allowed it.

The program runs under bubblewrap (`bwrap`): user, mount, pid, network and IPC namespaces of its
own, no capability, Python and the system's libraries read-only and nothing else of the disk, a
small temporary folder in memory that vanishes with it, nothing of the environment. It sees no
other process, no network, no file of its user and no secret, and what it starts dies with it.
Limits on processor time, memory, processes, size and number of files, and a deadline, come on top.

**The verdict does not come from the program.** The tests run in a second process, shut away alike,
which asks the first over a pipe for the results of calls. Only plain values travel, so that an
object that equals everything, an early exit or a forged reply is no pass.

Where bwrap is missing programs are refused, unless `unconfined` is asked for: then they run as the
user who measures, with the limits alone. Such a program can read, change, delete and send away
whatever that user can.
"""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from kvtrim.errors import UsageError

_ALLOWED: ContextVar[str] = ContextVar("allowed", default="")
_INSIDE = Path(__file__).with_name("inside.py")
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/alternatives")
_FOLDER_BYTES = 16 << 20
_ISOLATED = ("-s", "-P", "-B")  # no site of the user, no module beside the script
_CLOSED = ("--remount-ro", "/dev", "--remount-ro", "/")
_PLACE = "/kvtrim"  # where a program finds its folder
# the same order of sets in every run, and one thread for libraries that would start many
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
CONFINED, UNCONFINED = "confined", "unconfined"


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    wall_s: float = 20.0
    cpu_s: int = 5
    memory_bytes: int = 1 << 30  # address space
    file_bytes: int = 1 << 20  # of each file it writes
    open_files: int = 32
    processes: int = 0  # besides itself, threads included


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    passed: bool
    reason: str  # "passed", "timeout", an exception's name, "exit 1", "signal 11"


@contextmanager
def allow(unconfined: bool = False) -> Iterator[None]:
    """Allow programs to be run inside the block, in this thread.

    Args:
        unconfined: without bwrap: as the user who measures, who loses what the program takes.
    """
    before = _ALLOWED.set(UNCONFINED if unconfined else CONFINED)
    try:
        yield
    finally:
        _ALLOWED.reset(before)


allowed = allow
"""Its old name, for one version."""


def is_allowed() -> bool:
    """Is it allowed to run programs here and now?"""
    return bool(_ALLOWED.get())


def run(
    program: str,
    limits: Limits | None = None,
    *,
    tests: str | None = None,
    known: str = "",
    entry: str = "",
) -> Outcome:
    """Run a program, and tests of it in another process.

    Args:
        tests: what is asserted of the program's names; by default the assertions (and `check`) at
            its end.
        known: code that the tests trust, whose names are not the program's.
        entry: the name that is the program's even if `known` has it.

    Raises:
        UsageError: nobody allowed it, there is no bwrap, or not even an empty program passes here.
    """
    if not is_allowed():
        raise UsageError(
            "this would run code that a model wrote; allow it with --allow-code-execution, in "
            "Python with `with kvtrim.tasks.sandbox.allow():`"
        )
    shell = require(_ALLOWED.get() == UNCONFINED)
    if tests is None:
        program, tests, known = apart(program)
    return _try(shell, program, tests, known, entry, limits or Limits())


def require(unconfined: bool = False) -> list[str]:
    """What programs are run under here; nothing where that is asked for.

    Raises:
        UsageError: there is no bwrap, or not even an empty program passes here.
    """
    shell = [] if unconfined else _shell()
    _works(tuple(shell))
    return shell


def apart(program: str) -> tuple[str, str, str]:
    """A program, the assertions at its end, and the imports that these may use; what does not
    parse is left whole.
    """
    try:
        body = ast.parse(program).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return program, "", ""
    cut = len(body)
    while cut and _asserts(body[cut - 1]):
        cut -= 1
    kinds = (ast.Import, ast.ImportFrom)
    imports: list[ast.stmt] = [node for node in body[:cut] if isinstance(node, kinds)]
    parts = (ast.Module(some, type_ignores=[]) for some in (body[:cut], body[cut:], imports))
    first, last, own = (ast.unparse(part) for part in parts)
    return first, last, own if last else ""


def _asserts(node: ast.stmt) -> bool:
    if isinstance(node, ast.FunctionDef):
        return node.name == "check"
    call = node.value if isinstance(node, ast.Expr) else None
    named = call.func if isinstance(call, ast.Call) else None
    checks = isinstance(named, ast.Name) and named.id == "check"
    return checks or isinstance(node, ast.Assert)


@cache
def _shell() -> list[str]:
    """Bwrap with everything shut.

    Raises:
        UsageError: it is not there, or cannot make namespaces here.
    """
    found = shutil.which("bwrap")
    own = Path(_python()).resolve().parent
    python = {
        sys.prefix,
        sys.base_prefix,
        *([] if own.is_relative_to(sys.base_prefix) else [str(own)]),
    }
    if found is None:
        raise UsageError(f"programs run under bubblewrap, which is not installed; {_REMEDY}")
    there = [path for path in (*_SYSTEM, *sorted(python)) if os.path.exists(path)]
    parents = {str(each): 0 for path in [*there, _PLACE] for each in reversed(Path(path).parents)}
    opened = [word for each in parents for word in ("--perms", "0755", "--dir", each)]
    binds = [word for path in there for word in ("--ro-bind", path, path)]
    shut = [
        *(
            "--unshare-ipc",
            "--unshare-pid",
            "--unshare-net",
            "--unshare-uts",
            "--unshare-cgroup-try",
        ),
        *("--hostname", "kvtrim", "--die-with-parent", "--new-session", "--cap-drop", "ALL"),
        *(*opened, "--perms", "0755", "--dir", _PLACE),
        *(*binds, "--ro-bind", str(_INSIDE), f"{_PLACE}/inside.py", "--dev", "/dev"),
        *("--perms", "0777", "--size", str(_FOLDER_BYTES), "--tmpfs", f"{_PLACE}/work"),
        *("--chdir", f"{_PLACE}/work"),
    ]
    why = ["no reason"]
    for user in _users():
        made = [found, *shut, *user]
        tried = subprocess.run(
            [*made, *_CLOSED, _python(), *_ISOLATED, f"{_PLACE}/inside.py", "start"],
            capture_output=True,
            text=True,
            check=False,
        )
        if tried.returncode == 0:
            return made
        why = tried.stderr.strip().splitlines()[-1:] or why
    raise UsageError(f"bubblewrap cannot shut programs away here ({why[0]}); {_REMEDY}")


_REMEDY = (
    "install it (apt-get install bubblewrap) or let it make user namespaces, or run programs "
    "`unconfined` (--unconfined): then they can read, change, delete and send away whatever you "
    "can"
)


def _python() -> str:
    return sys.executable


def _users() -> Iterator[list[str]]:
    """Whose processes a program's are, the best first.

    In a user namespace root's own are root's to the kernel, which does not limit their number. So
    root makes none where it can do without, and becomes nobody inside, before a program is there.
    """
    own = ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    if os.geteuid() == 0:
        yield ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    yield [*own, "--disable-userns"]
    yield own


@cache
def _works(shell: tuple[str, ...]) -> None:
    """Refuse once and for all to score where the sandbox itself cannot start."""
    found = _try(list(shell), "pass", "", "", "", Limits())
    if not found.passed:
        raise UsageError(
            f"programs cannot be run here: an empty one ended with {found.reason!r} instead of "
            f"passing; see whether `{_python()} {_INSIDE.name}` may start processes with limits "
            "on memory and files here, or score this run on another machine"
        )


def _try(
    shell: list[str], program: str, tests: str, known: str, entry: str, limits: Limits
) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="kvtrim-", ignore_cleanup_errors=True) as folder:
        job = Path(folder, "job")
        given = {"program": program, "tests": tests, "known": known, "entry": entry}
        job.write_text(json.dumps(given))
        place = Path(folder, "work")  # of a program that is not confined
        place.mkdir()
        os.chmod(job, 0o644)
        return _both(shell, job, place, limits)


def _both(shell: list[str], job: Path, place: Path, limits: Limits) -> Outcome:
    """Start program and tests, each with an end of two pipes, and wait for the tests."""
    (heard, said), (told, tell) = os.pipe(), os.pipe()
    words = json.dumps(asdict(limits) | {"leave_root": bool(shell)})
    inside = f"{_PLACE}/inside.py" if shell else str(_INSIDE)
    name = f"{_PLACE}/job" if shell else str(job)
    seen = ["--ro-bind", str(job), f"{_PLACE}/job"] if shell else []
    python = [_python(), *_ISOLATED, inside]
    closed = _CLOSED if shell else ()
    tester = [*shell, *seen, *closed, *python, "test", words, name]
    started: list[subprocess.Popen[bytes]] = []
    where = None if shell else place
    try:
        for words_of, ends, errors in (
            ([*shell, *closed, *python, "answer", words], (heard, tell), subprocess.DEVNULL),
            (tester, (told, said), subprocess.PIPE),
        ):  # fmt: skip
            started.append(
                subprocess.Popen(
                    words_of,
                    stdin=ends[0],
                    stdout=ends[1],
                    stderr=errors,
                    env=_ENVIRONMENT,
                    cwd=where,
                    start_new_session=True,
                )
            )
    finally:
        for end in (heard, said, told, tell):
            os.close(end)
        if len(started) < 2:
            _kill(started)
    return _verdict(started[0], started[1], limits.wall_s)


def _verdict(
    answer: "subprocess.Popen[bytes]", tests: "subprocess.Popen[bytes]", wall_s: float
) -> Outcome:
    """What the tests say; the program's own end is a reason, never a pass."""
    try:
        _, said = tests.communicate(timeout=wall_s)
        if tests.returncode == 0:
            return Outcome(True, "passed")
        if tests.returncode == 1 and said:
            return Outcome(False, said.decode("ascii", "replace")[:100])
        if tests.returncode == 3:  # the program is gone
            return Outcome(False, _reason(answer.wait(5)))
        return Outcome(False, _reason(tests.returncode))
    except subprocess.TimeoutExpired:
        return Outcome(False, "timeout")
    finally:
        _kill([answer, tests])


def _kill(started: "list[subprocess.Popen[bytes]]") -> None:
    """Whatever is left of their groups."""
    for process in started:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def _reason(code: int) -> str:
    """An exit status in words; bwrap gives 128 and more for signals."""
    number = -code if code < 0 else code - 128 if code > 128 else 0
    if number == signal.SIGXCPU:
        return "timeout"
    return f"signal {number}" if number else f"exit {code}"
