"""Running a program that a model wrote, with limits, and only if somebody allowed it.

The program runs in a Python process of its own: no site of the user and nothing of the
environment, an empty temporary folder to work in, no input, output thrown away, limits on
processor time, memory, size and number of files, and a deadline after which its whole process
group is killed. Inside (`inside.py`) it stops being root if Python can be read without; on
Linux the kernel refuses it sockets, new processes and threads, and signals to others; everywhere
an audit hook refuses these, foreign libraries, and writing outside its folder.

**This is no jail.** It stops mistakes: endless loops, exhausted memory, a stray `rmtree`. It does
not stop a program that sets out to get past Python's audit hooks, and what its user can read it
can read. Measure models you have reason to distrust inside a container or a virtual machine.

A program passes if it runs to its end: the process then reports a random token that it was
given on a pipe and reads only after the program has ended. So neither `exit(0)` nor anything that
the program prints looks like a pass.
"""

import json
import os
import secrets
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

_ALLOWED: ContextVar[bool] = ContextVar("allowed", default=False)
_INSIDE = Path(__file__).with_name("inside.py")
# the same order of sets in every run, and one thread for libraries that would start many
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


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
def allowed() -> Iterator[None]:
    """Allow programs to be run inside the block, in this thread."""
    before = _ALLOWED.set(True)
    try:
        yield
    finally:
        _ALLOWED.reset(before)


def is_allowed() -> bool:
    """Is it allowed to run programs here and now?"""
    return _ALLOWED.get()


def run(program: str, limits: Limits | None = None) -> Outcome:
    """Run a program to its end, or to that of its limits.

    Raises:
        UsageError: nobody allowed it, the system has no process limits (Windows), or not even an
            empty program passes here.
    """
    if not is_allowed():
        raise UsageError(
            "this would run code that a model wrote; allow it with --allow-code-execution, in "
            "Python with `with kvtrim.tasks.sandbox.allowed():`"
        )
    if os.name != "posix":
        raise UsageError(
            "programs can only be limited on Linux and macOS; measure this task there"
        )
    _works()
    return _tried(program, limits or Limits())


@cache
def _works() -> None:
    """Refuse once and for all to score where the sandbox itself cannot start."""
    found = _tried("pass", Limits())
    if not found.passed:
        raise UsageError(
            f"programs cannot be run here: an empty one ended with {found.reason!r} instead of "
            f"passing; see whether `{sys.executable} {_INSIDE.name}` may start processes with "
            "limits on memory and files here, or score this run on another machine"
        )


def _tried(program: str, limits: Limits) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="kvtrim-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o777)  # the program may run as another user
        Path(folder, "program").write_text(json.dumps(program))
        return _run(limits, folder)


def _run(limits: Limits, folder: str) -> Outcome:
    token = secrets.token_hex(16).encode()
    (key, hand), (told, tell) = os.pipe(), os.pipe()
    os.write(hand, token)
    os.close(hand)
    words = [json.dumps(asdict(limits)), str(key), str(tell)]
    try:
        process = subprocess.Popen(
            [sys.executable, "-s", "-P", "-B", str(_INSIDE), *words],
            cwd=folder,
            env=_ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(key, tell),
            start_new_session=True,
        )
    except BaseException:
        os.close(told)
        raise
    finally:
        os.close(key)
        os.close(tell)
    with open(told, "rb", buffering=0) as answer:
        ended = _wait(process, limits.wall_s)
        os.set_blocking(answer.fileno(), False)
        said = answer.read(200) or b""
    if ended and said == token:
        return Outcome(True, "passed")
    return Outcome(False, _reason(process.returncode, said) if ended else "timeout")


def _wait(process: "subprocess.Popen[bytes]", wall_s: float) -> bool:
    """Did it end in time? Whatever is left of its group is killed."""
    try:
        process.wait(wall_s)
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _reason(code: int, said: bytes) -> str:
    if said.startswith(b"- "):
        return said[2:].decode(errors="replace")
    if code == -signal.SIGXCPU:
        return "timeout"
    return f"signal {-code}" if code < 0 else f"exit {code}"
