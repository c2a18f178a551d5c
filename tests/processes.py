"""`kvtrim ...`, or another program, as a process of its own that tests serve with, or kill.

It is forked from this one: torch, transformers and kvtrim are loaded already. What a fresh
interpreter loads is left to tests of just that, such as those of `python -m kvtrim --version`.
"""

import os
import signal
import sys
import time
import warnings
from multiprocessing import forkserver

import pytest


class Process:
    """A child of this process; what it prints can be read from `stdout`."""

    def __init__(self, number, stdout):
        self.pid, self.stdout, self.returncode = number, stdout, None

    def poll(self):
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout=60):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise TimeoutError(f"process {self.pid} runs on after {timeout} s")
            time.sleep(0.02)
        self.stdout.close()
        return self.returncode

    def send_signal(self, which):
        if self.poll() is None:
            os.kill(self.pid, which)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def start(*command, folder=".", log=os.devnull, **environment):
    """`kvtrim ...` in a folder; its errors go to the end of a file."""
    from kvtrim.cli import main  # here, once for all children

    return fork(main, "kvtrim", *command, folder=folder, log=log, **environment)


def fork(main, *command, folder=".", log=os.devnull, **environment):
    """A program as a process: `main` is called, and finds the command in `sys.argv`."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads only wait
        number = os.fork()
    if number:
        os.close(writing)
        return Process(number, os.fdopen(reading))
    status = 70
    try:
        os.close(reading)
        status = _run(main, command, folder, log, environment, writing)
    finally:
        os._exit(status)


def _run(main, command, folder, log, environment, writing):
    errors = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for here, there in ((nothing, 0), (writing, 1), (errors, 2)):
        os.dup2(here, there)
        os.close(here)
    sys.stdin = open(0, closefd=False)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
    os.chdir(folder)
    os.environ.update(environment)
    warnings.resetwarnings()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Ray leaves one of its own
    if forkserver._forkserver._forkserver_pid is not None:  # the parent's, which serves this too
        forkserver._forkserver.ensure_running = lambda: None
    sys.argv = [*map(str, command)]
    try:
        main()
    except SystemExit as left:
        return left.code or 0
    finally:
        sys.stdout.flush()
    return 0


def kill_once(so_far, what, *command, folder, **environment):
    """Start `kvtrim ...` in a folder and kill it as soon as `so_far()`, within three minutes."""
    kill(start(*command, folder=folder, **environment), so_far, what)


def kill(process, so_far, what):
    """Kill a process as soon as `so_far()`, within three minutes."""
    try:
        for _ in range(18000):
            if so_far():
                return
            assert process.poll() is None, f"{what}: it ended by itself"
            time.sleep(0.01)
        pytest.fail(f"{what} in three minutes")
    finally:
        process.kill()
        process.wait()
