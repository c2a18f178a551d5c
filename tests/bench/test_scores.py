"""Scores and tables that are made from a run's lines."""

import os

import pytest

from kvtrim.bench.eval import scores
from kvtrim.records import NEEDS_PERMISSION, OK
from kvtrim.tasks import TASKS, sandbox
from kvtrim.tasks.base import Request

PROBLEMS = [
    {
        "id": f"HumanEval/{number}",
        "prompt": f'def add{number}(a, b):\n    """ The sum plus {number}.\n    """\n',
        "canonical_solution": f"    return a + b + {number}\n",
        "entry_point": f"add{number}",
        "test": f"\n\ndef check(candidate):\n    assert candidate(1, 2) == {3 + number}\n",
    }
    for number in range(2)
]


@pytest.mark.skipif(os.name != "posix", reason="needs process limits")
def test_programs_run_where_that_was_allowed_and_nowhere_else():
    task = TASKS["humaneval"]
    samples = list(task.samples(Request(lambda _: PROBLEMS, len)))
    inputs = [
        {"task": task.name, "sample": one.id, "answers": list(one.answers), "prefix": one.prefix}
        | {"group": dict(one.group), "extra": dict(one.extra)}
        for one in samples
    ]
    written = ["    return a + b\n", "    return a - b\n"]
    key = {"task": task.name, "method": "full", "keep": "", "protocol": "question-aware"}
    lines = [
        key | {"sample": one.id, "answer": answer, "outcome": OK}
        for one, answer in zip(samples, written, strict=True)
    ]
    found = []
    for line in scores.score_answers(inputs, lines, {task.name: task}, allowed=True):
        assert not sandbox.is_allowed()
        found.append((line["score"], line["outcome"]))
    assert found == [(1.0, OK), (0.0, OK)]
    without = list(scores.score_answers(inputs, lines, {task.name: task}))
    assert [line["outcome"] for line in without] == [NEEDS_PERMISSION] * 2
