"""docs/tasks.md: every benchmark of the table as Markdown."""

from kvtrim.report.format import Cells
from kvtrim.tasks import GROUPS, TASKS
from kvtrim.tasks.base import Task
from kvtrim.tasks.rows import ENDINGS
from kvtrim.tasks.sources import SOURCES, Source

_HEAD = """# Benchmarks

<!-- Written by `make docs` from the table of tasks: edits here are lost. -->

A benchmark is a table entry: prompts made of strings, how long an answer may be, and a scorer that
gives 0 to 1. Its prompt is a document, which a cache may be compressed to before the rest is known
(question-agnostic), then a question, then, for some, the beginning of the answer, which is given.
Each module of `kvtrim.tasks` says which paper and code it follows, and where it differs.

Rows are read from a folder (`--data DIR` or `KVTRIM_DATA`) or from the Hugging Face Hub, never
from both in one run. RULER's and the needle prompts are made from a seed, at the length asked for,
answer included, chat template not included (close to the model's window they leave room for it);
a length too short for a task is refused with one that is not (with SmolLM2's tokenizer `ruler-vt`
needs about 600 tokens, `ruler-cwe` about 900).

Scores are those of the papers' own code, apart from the differences that `kvtrim.tasks.scorers`
lists. LongBench's few-shot questions hold the passage or dialogue that they are about, so that
question-agnostic eviction compresses the examples alone; the code tasks ask "Next line of code:".
"""
_DATA_HEAD = f"""
## Data

A file may end in {", ".join(f"`{ending}`" for ending in ENDINGS)}; the first that is there is
read, and runs record its name, rows and SHA-256. Licences are those of the texts: they are read at
run time, and are no part of kvtrim. Files as published (LongBench's `data/*.jsonl`, SQuAD's
`dev-v2.0.json`, HotpotQA's `hotpot_dev_distractor_v1.json`) are understood.
"""
_FILES = ("name", "in a folder", "on the Hub", "licence")


def manual() -> str:
    """The whole file."""
    groups = [(f"`{name}`", ", ".join(f"`{one}`" for one in of)) for name, of in GROUPS.items()]
    columns = ("task", "asks", "metric", "new tokens", "chat template", "data", "source")
    return "".join(
        [
            _HEAD,
            "\n## Tasks\n\n",
            Cells.texts(columns, map(_row, TASKS.values())).markup(),
            "\n## Groups\n\n",
            Cells.texts(("group", "tasks"), groups).markup(),
            _DATA_HEAD + "\n",
            Cells.texts(_FILES, map(_source, SOURCES.items())).markup(),
        ]
    )


def _row(task: Task) -> tuple[str, ...]:
    data = ", ".join(f"`{name}`" for name in task.data) or "made"
    chat = {None: "if there is one", True: "yes", False: "no"}[task.chat]
    about = task.about + (" Runs what the model wrote." if task.runs_code else "")
    about += f" Examples: {task.shots}." if task.shots else ""
    new = str(task.max_new_tokens)
    return f"`{task.name}`", about, task.metric, new, chat, data, task.source


def _source(entry: tuple[str, Source]) -> tuple[str, ...]:
    name, source = entry
    files = ", ".join(f"`{stem}`" for stem in source.files)
    return f"`{name}`", files, f"`{source.hub.name}`" if source.hub else source.get, source.licence
