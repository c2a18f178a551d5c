"""What runs inside the process that `sandbox` starts: limits first, then the program.

Started as a script, with nothing of kvtrim: `sandboxed.py LIMITS KEY TELL`. The program is a JSON
string in the file `program`, KEY the pipe with the token, TELL the one for the outcome.
"""

import ctypes
import errno
import json
import os
import resource
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any

NOBODY = 65534
CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
REFUSED = (
    *("socket.", "subprocess.", "ctypes.", "pty.", "os.fork", "os.exec", "os.posix_spawn"),
    *("os.system", "os.kill", "signal.pthread_kill", "resource.", "syslog.", "fcntl."),
)
ONLY_INSIDE = (
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.chown", "os.utime", "os.setxattr", "os.removexattr", "shutil.", "tempfile."),
)
# for each architecture its number, and those of socket, clone, clone3, execve, execveat, kill,
# tkill, tgkill, ptrace, process_vm_writev, io_uring_setup, unshare, setns, mount, setrlimit,
# prlimit64 (and fork and vfork, which x86 alone has)
SYSTEM_CALLS = {
    "x86_64": (
        *(0xC000003E, 41, 56, 435, 59, 322, 62, 200, 234, 101, 311, 425, 272, 308, 165, 160, 302),
        *(57, 58),
    ),
    "aarch64": (
        *(
            0xC00000B7,
            198,
            220,
            435,
            221,
            281,
            129,
            130,
            131,
            117,
            271,
            425,
            97,
            268,
            40,
            164,
            261,
        ),
    ),
}


def limit(limits: dict[str, Any]) -> None:
    """Limits of the system, as far as it has them."""
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


def leave_root() -> None:
    """Become nobody where this is root, unless nobody could not read Python's own library."""
    if os.getuid() != 0:
        return
    with suppress(OSError):
        os.setgroups([])
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
        try:
            os.listdir(os.path.dirname(os.__file__))
        finally:
            os.seteuid(0)
            os.setegid(0)
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def refuse_system_calls() -> None:
    """No sockets, no new processes or threads, no signals: by the kernel, where it is Linux."""
    known = SYSTEM_CALLS.get(os.uname().machine)
    if sys.platform != "linux" or known is None or sys.maxsize < 1 << 32:
        return
    architecture, *calls = known
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    count = len(calls)
    steps = [
        (load, 0, 0, 4),  # the architecture that the call is made for
        (equal, 0, count + 3, architecture),
        (load, 0, 0, 0),  # the call's number
        (at_least, count + 1, 0, 0x40000000),  # a second set of numbers on x86
        *((equal, count - at, 0, call) for at, call in enumerate(calls)),
        (give, 0, 0, 0x7FFF0000),  # allow
        (give, 0, 0, 0x00050000 | errno.EPERM),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    rules = ctypes.create_string_buffer(
        struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(code))
    )
    system = ctypes.CDLL(None)
    system.prctl(38, 1, 0, 0, 0)  # no new privileges
    system.prctl(22, 2, rules)  # filter


def watcher(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that refuses what a solution has no business with."""
    inside = os.path.realpath(folder) + os.sep
    resolve, decode, given = os.path.realpath, os.fsdecode, (str, bytes)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(REFUSED):
            raise PermissionError(f"{event} is not allowed here")
        changes = event == "open" and (arguments[2] or 0) & CHANGES
        if changes or event.startswith(ONLY_INSIDE):
            for path in arguments[:1] if changes else arguments:
                if isinstance(path, given) and not resolve(decode(path)).startswith(inside):
                    raise PermissionError(f"{event} is not allowed outside the folder")

    return watch


def main() -> None:
    """Limits, then the program; the token is read and told only at its end."""
    limits, key, tell = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    with open("program") as file:
        program = json.load(file)
    os.remove("program")
    read, write, leave = os.read, os.write, os._exit
    module = ModuleType("program")
    sys.modules["program"] = module
    limit(limits)
    leave_root()
    refuse_system_calls()
    sys.addaudithook(watcher(os.getcwd()))
    try:
        exec(compile(program, "program", "exec"), module.__dict__)
    except BaseException as error:  # SystemExit is no pass either
        write(tell, b"- " + type(error).__name__.encode()[:100])
        leave(1)
    write(tell, read(key, 100))
    leave(0)


if __name__ == "__main__":
    main()
