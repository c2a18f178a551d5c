import pytest
from real_rows import named, needs_data, request, texts

from kvtrim.errors import UsageError
from kvtrim.tasks.humaneval import TASKS
from kvtrim.tasks.sandbox import allow


def row(number):
    return {
        "id": f"HumanEval/{number}",
        "prompt": f'def add{number}(a, b):\n    """ The sum plus {number}.\n    """\n',
        "canonical_solution": f"    return a + b + {number}\n",
        "entry_point": f"add{number}",
        "test": f"\n\ndef check(candidate):\n    assert candidate(1, 2) == {3 + number}\n",
    }


ROWS = {"humaneval": [row(number) for number in range(10)]}


def samples(name, **wanted):
    return list(named(TASKS, name).samples(request(ROWS, **wanted)))


def worth(answer):
    with allow():
        return named(TASKS, "humaneval").score(answer, samples("humaneval")[0])


def test_without_examples_the_prompt_is_the_problem_as_it_is():
    first = samples("humaneval")[0]
    assert first.document.text + first.question == row(0)["prompt"]
    assert first.question == '    """\n'
    assert len(samples("humaneval")) == 10
    assert len(samples("humaneval", limit=3)) == 3


def test_the_first_eight_problems_are_examples_and_are_not_asked():
    found = samples("humaneval-8")
    assert [one.id for one in found] == ["HumanEval/8", "HumanEval/9"]
    solved = [(row(n)["prompt"] + row(n)["canonical_solution"]).rstrip() for n in range(8)]
    assert texts(found[0].document) == [[one] for one in solved]
    assert found[0].document.text == "".join(one + "\n\n\n" for one in solved)
    assert found[0].question == row(8)["prompt"]


def test_code_runs_only_where_that_is_allowed():
    assert all(task.runs_code for task in TASKS)
    with pytest.raises(UsageError, match="--allow-code-execution"):
        named(TASKS, "humaneval").score("    return 3\n", samples("humaneval")[0])


@pytest.mark.parametrize(
    ("answer", "passes"),
    [
        ("    return a + b\n", 1),
        ("    return a + b", 1),
        ("    total = a\n    total += b\n    return total", 1),
        ("    return a - b", 0),
        ("    pass", 0),
        ("return a + b", 0),
        ("", 0),
        ("    import sys\n    sys.exit(0)", 0),
        ("    return 3\nraise SystemExit", 0),
        ("    print('passed')\n    return 0", 0),
    ],
)
def test_an_answer_passes_if_its_tests_run_to_their_end(answer, passes):
    assert worth(answer) == passes


@needs_data
@pytest.mark.parametrize("name", ["humaneval", "humaneval-8"])
def test_real_solutions_pass_and_empty_ones_fail(name):
    task = named(TASKS, name)
    found = list(task.samples(request()))
    assert len(found) == (164 if name == "humaneval" else 156)
    assert all(one.document.text and one.question for one in found)
    with allow():
        for one in found[::40]:
            assert task.score(one.answers[0], one) == 1
            assert task.score("    pass\n", one) == 0
