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

from kvtrim.cli import main
from rooms import ROOT

MOST = 54  # one more for what is structure in a text: `demote` needs it named before it is read


@pytest.fixture
def passed(monkeypatch, capsys, tmp_path, model_folder):
    """Run a command twice; how often each function ran the second time, by (file, name)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "doc.txt").write_text("The cat sat on the mat and looked at the blue sea. " * 5)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["kvtrim", *arguments, "--model", str(model_folder)])
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
                with pytest.raises(SystemExit) as left:
                    main()
            finally:
                sys.setprofile(before)
                threading.setprofile(None)
                gc.enable()
            assert not left.value.code, capsys.readouterr().err
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
