import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvtrim.errors import UsageError
from kvtrim.tasks import sandbox
from kvtrim.tasks.sandbox import Limits, Outcome, allowed, is_allowed

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs process limits")
INSIDE = Path(sandbox.__file__).with_name("inside.py")
SHORT = Limits(wall_s=15, cpu_s=1)


def run(program, limits=SHORT):
    with allowed():
        return sandbox.run(program, limits)


def test_nothing_runs_unless_it_is_allowed(tmp_path):
    with pytest.raises(UsageError, match="--allow-code-execution"):
        sandbox.run("pass")
    with pytest.raises(ZeroDivisionError), allowed():
        assert is_allowed()
        raise ZeroDivisionError
    assert not is_allowed()


def test_a_program_passes_if_it_runs_to_its_end():
    assert run("def f(n):\n    return n + 1\nassert f(1) == 2") == Outcome(True, "passed")
    assert run("import re, math, typing, hashlib, collections") == Outcome(True, "passed")
    assert run("") == Outcome(True, "passed")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("'\ud800'.encode()", "UnicodeEncodeError"),
        ("import sys\nsys.exit(0)", "SystemExit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import os\nos._exit(0)", "exit 0"),
        ("input()", "EOFError"),
        ("def f(): f()\nf()", "RecursionError"),
    ],
)
def test_a_program_that_ends_otherwise_fails(program, reason):
    assert run(program) == Outcome(False, reason)


def test_no_output_looks_like_a_pass():
    for text in ("passed", "0" * 32, '{"passed": true}'):
        assert not run(f"print({text!r})\nimport os\nos._exit(0)").passed
    # not even on the pipe itself: the token is not known while the program runs
    blind = "import os\nfor n in range(3, 40):\n    try: os.write(n, b'0' * 32)\n"
    assert not run(blind + "    except OSError: pass\nos._exit(0)").passed


def test_an_endless_loop_is_killed():
    start = time.monotonic()
    assert run("while True: pass") == Outcome(False, "timeout")
    assert run("import time\ntime.sleep(60)", Limits(wall_s=1)) == Outcome(False, "timeout")
    assert time.monotonic() - start < 25


def test_memory_is_limited():
    hog = "kept = []\nwhile True: kept.append(bytearray(10**7))"
    assert run(hog, Limits(memory_bytes=200 << 20)) == Outcome(False, "MemoryError")


def test_files_stay_in_the_folder_and_small(tmp_path):
    target = tmp_path / "kept"
    target.write_text("kept")
    assert run("open('own', 'w').write('x')\nimport os\nos.remove('own')").passed
    assert run("open('own', 'w').write('x' * 2**22)").reason == "OSError"
    for harm in (
        f"open({str(target)!r}, 'w')",
        f"import os\nos.open({str(target)!r}, os.O_WRONLY | os.O_TRUNC)",
        f"import os\nos.remove({str(target)!r})",
        f"import os\nos.rename({str(target)!r}, 'own')",
        f"import shutil\nshutil.rmtree({str(tmp_path)!r})",
        f"import pathlib\npathlib.Path({str(target)!r}).unlink()",
        f"import os\nos.symlink({str(target)!r}, 'own')\nopen('own', 'w')",
    ):
        assert run(harm) == Outcome(False, "PermissionError")
    assert target.read_text() == "kept"


def test_nothing_of_the_environment_goes_in(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "1")
    assert run("import os\nassert not {'SECRET_TOKEN', 'HOME', 'PATH'} & set(os.environ)").passed
    assert run("import os\nassert os.listdir('.') == []").passed
    assert run("import sandboxed").reason == "ModuleNotFoundError"


def test_sets_have_the_same_order_in_every_run():
    order = "assert list({'a', 'b', 'c', 'd', 'e', 'f'}) == "
    first = subprocess.run(
        [sys.executable, "-c", "print(list({'a', 'b', 'c', 'd', 'e', 'f'}))"],
        env={"PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run(order + first.stdout).passed


@pytest.mark.parametrize(
    "harm",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.system('true')",
        "import os\nos.execv('/bin/true', ['true'])",
        "import os\nos.kill(os.getppid(), 9)",
        "import os\nos.killpg(os.getppid(), 9)",
        "import socket\nsocket.create_connection(('127.0.0.1', 9))",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9')",
        "import ctypes\nctypes.CDLL(None).getpid()",
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
    ],
)
def test_processes_signals_and_the_network_are_refused(harm):
    assert run(harm).reason in ("PermissionError", "URLError")


# the layers below the audit hook, each by itself


def alone(layer, program):
    """What a program raises in a process with one layer only."""
    code = (
        f"import runpy\ninside = runpy.run_path({str(INSIDE)!r})\n{layer}\n"
        f"try:\n    {program}\n    print('done')\n"
        "except Exception as error:\n    print(type(error).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    return done.stdout.split()[-1] if done.stdout else done.returncode


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone filters system calls")
@pytest.mark.parametrize(
    ("program", "raised"),
    [
        ("import os; os.fork() or os._exit(0)", "PermissionError"),
        ("import subprocess; subprocess.run(['true'])", "PermissionError"),
        ("import threading; threading.Thread(target=print).start()", "RuntimeError"),
        ("import socket; socket.socket()", "PermissionError"),
        ("import os; os.kill(os.getpid(), 9)", "PermissionError"),
        ("sum(range(10)); open('/dev/null').read()", "done"),
    ],
)
def test_the_kernel_refuses_them_too(program, raised):
    assert alone("inside['refuse_system_calls']()", program) == raised


@pytest.mark.skipif(os.name == "posix" and os.getuid() == 0, reason="root has no such limit")
def test_the_process_limit_refuses_a_fork():
    limits = {**Limits().__dict__}
    assert alone(f"inside['limit']({limits})", "import os; os.fork() or os._exit(0)") == (
        "BlockingIOError"
    )


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="root alone can leave root")
def test_root_is_left_where_python_can_be_read_without(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    for folder, user in (("/", 65534), (closed, 0)):
        layer = f"import os\nos.__file__ = '{folder}/os.py'\ninside['leave_root']()"
        assert alone(layer, f"assert os.getresuid() == ({user},) * 3 == os.getresgid()") == "done"
        if user:
            assert alone(layer, "os.setuid(0)") == "PermissionError"


def test_a_sandbox_that_cannot_start_is_refused_and_not_scored(monkeypatch):
    sandbox._works.cache_clear()
    with monkeypatch.context() as broken:
        broken.setattr(sys, "executable", "/bin/false")
        with allowed(), pytest.raises(UsageError, match="an empty one ended with 'exit 1'"):
            sandbox.run("pass")
    assert run("pass").passed
