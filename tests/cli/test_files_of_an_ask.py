"""How much of the house a question and an evaluation pass through; how often a method is settled.

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

MOST, MOST_OF_AN_EVAL = 48, 70


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
        own = [(name.removeprefix(f"{ROOT}/"), code) for name, code in calls if str(ROOT) in name]
        assert own, f"another kvtrim was loaded than the one in {ROOT}"
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


def test_an_evaluation_of_two_samples_passes_few_files(passed):
    asked = "--method snapkv --keep 48 --set window=8 --limit 2 --protocol question-aware".split()
    calls = passed("eval", "--task", "bench.questions:WORDS_TASK", *asked)
    files = {name for name, _ in calls}
    assert len(files) <= MOST_OF_AN_EVAL, sorted(files)
