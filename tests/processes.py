"""Processes that tests kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def kill_once(so_far, what, *command, folder, **environment):
    """Start `kvtrim ...` in a folder and kill it as soon as `so_far()`, within three minutes."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parent / "src"), os.environ.get("PYTHONPATH", "")]
    own = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment
    nowhere = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(
        [sys.executable, "-m", "kvtrim", *command], env=own, cwd=folder, **nowhere
    )
    try:
        for _ in range(4000):
            if so_far():
                return
            time.sleep(0.05)
        pytest.fail(f"{what} in three minutes")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
