"""How much of the house one question passes through, and how often its method is settled.

A file counts if one of its functions runs; what loading a module runs does not. The bound is what
was measured last: whoever comes below it lowers it, nobody raises it without saying why.
"""

import gc
import inspect
import sys
import threading
from collections import Counter

import pytest

from rooms import ROOT

MOST = 54  # one more for what is structure in a text: `demote` needs it named before it is read


@pytest.fixture
def passed(run):
    """Run a command twice; how often each function ran the second time, by (file, name)."""

    def call(*arguments):
        calls: Counter = Counter()

        def count(frame, event, _):
            code = frame.f_code
            if event == "call" and code.co_flags & inspect.CO_OPTIMIZED:
                calls[code.co_filename, code.co_name] += 1

        for hook in (None, count):  # the first run loads modules
            gc.collect()  # what other tests left behind ends in its own files
            gc.disable()
            before = sys.getprofile()
            threading.setprofile(hook)
            sys.setprofile(hook)
            try:
                code, _, err = run(*arguments)
            finally:
                sys.setprofile(before)
                threading.setprofile(None)
                gc.enable()
            assert not code, err
        own = ((name.removeprefix(f"{ROOT}/"), code) for name, code in calls if str(ROOT) in name)
        return {one: calls[f"{ROOT}/{one[0]}", one[1]] for one in own}

    return call


def test_an_ask_passes_few_files_and_settles_its_method_once(passed):
    calls = passed(
        "ask", "doc.txt", "-q", "?", "--method", "snapkv", "--keep", "40", "--max-new-tokens", "3"
    )
    files = {name for name, _ in calls}
    assert len(files) <= MOST, sorted(files)
    assert calls["methods/settings.py", "find"] == 1
    assert calls["methods/keep.py", "parse"] == 1
    assert calls["methods/method.py", "fitted"] == 1
