"""HumanEval: a function's head and description, gone on with, and run against its tests.

Paper:  Chen et al. 2021, https://arxiv.org/abs/2107.03374 (pass@1, one greedy answer).
Prompt: EleutherAI/lm-evaluation-harness 0.4.13, lm_eval/tasks/humaneval/humaneval.yaml: the
        problem as it is, its stops, no chat template.
Score:  1 if the tests of head and answer run to their end in `tasks.sandbox`, which needs leave.
Ours:   0 examples: the document is the problem without its last line (which closes the
        description), so that there is something to compress; the prompt as a whole is unchanged.
        8 examples (KVFundaBench names none): the first eight problems with their own solutions,
        two blank lines behind each; these eight are not asked.
"""

from collections.abc import Iterator
from functools import partial

from kvtrim.prompts.document import Document
from kvtrim.tasks import sandbox
from kvtrim.tasks.base import Request, Sample, Task
from kvtrim.tasks.shots import document

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
BETWEEN = "\n\n\n"


def score(answer: str, sample: Sample) -> float:
    """1 if the program passes its tests.

    Raises:
        UsageError: running it was not allowed, see `sandbox.allow`.
    """
    parts = sample.extra
    entry = parts["entry_point"]
    tests = f"{parts['test']}\ncheck({entry})\n"
    known = f"{parts['prompt']}    pass\n"  # its helpers, which the answer cannot redefine
    program = f"{parts['prompt']}{answer}\n"
    return float(sandbox.run(program, tests=tests, known=known, entry=entry).passed)


def cut(prompt: str) -> tuple[str, str]:
    """A problem without its last line, and that line."""
    end = prompt.rstrip("\n").rfind("\n") + 1
    return prompt[:end], prompt[end:]


def _samples(request: Request, count: int) -> Iterator[Sample]:
    rows = request.rows("humaneval")
    solved = [(row["prompt"] + row["canonical_solution"]).rstrip() for row in rows[:count]]
    examples = document(solved, between=BETWEEN)
    for row in rows[count:][: request.limit]:
        head, last = cut(row["prompt"])
        yield Sample(
            id=row["id"],
            document=examples if count else Document(head),
            question=row["prompt"] if count else last,
            answers=(row["canonical_solution"],),
            extra={name: row[name] for name in ("prompt", "test", "entry_point")},
        )


def _task(name: str, count: int) -> Task:
    return Task(
        name=name,
        version=1,
        about="A Python function from its head and description, run on tests; "
        f"{count or 'no'} solved problems before it.",
        source="lm-evaluation-harness 0.4.13, humaneval",
        metric="pass@1",
        max_new_tokens=1024,
        samples=partial(_samples, count=count),
        score=score,
        chat=False,
        stop=STOP,
        shots=f"the first {count} problems, which are not asked" if count else "",
        data=("humaneval",),
        runs_code=True,
    )


TASKS = (_task("humaneval", 0), _task("humaneval-8", 8))
