"""Which files and which Hub data sets the names of data stand for, and how rows look.

Rows have the same fields wherever they come from, those of the project's data folder; files that
were downloaded in their official form are understood as well.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Adapt = Callable[[list[Row], Path | None], list[Row]]

LONGBENCH = {
    "narrativeqa": "Apache-2.0",
    "qasper": "CC BY 4.0",
    "multifieldqa_en": "MIT",
    "hotpotqa": "CC BY-SA 4.0",
    "2wikimqa": "Apache-2.0",
    "musique": "CC BY 4.0",
    "gov_report": "not stated (US government reports)",
    "qmsum": "MIT",
    "multi_news": "non-commercial research and education",
    "trec": "unknown",
    "triviaqa": "unknown (question and web text rights vary)",
    "samsum": "CC BY-NC-ND 4.0",
    "passage_count": "MIT, text CC BY-SA",
    "passage_retrieval_en": "MIT, text CC BY-SA",
    "lcc": "not stated (public GitHub code)",
    "repobench-p": "CC BY-NC-ND 4.0",
}
"""The 16 English tasks and the licences of their texts."""


_OFFLINE = "Or measure the group ruler-offline, which is RULER without the tasks that need this."


@dataclass(frozen=True)
class Hub:
    """A data set of the Hugging Face Hub."""

    path: str  # its id
    config: str | None = None
    split: str = "test"
    archive: str = ""  # a zip file of it, where it has no files that `datasets` can load
    file: str = ""  # in that archive

    @property
    def name(self) -> str:
        """One line for records."""
        parts = (self.archive, self.file) if self.archive else (self.config, self.split)
        return "/".join(part for part in (self.path, *parts) if part)


@dataclass(frozen=True)
class Source:
    """Where the rows of one name are, how they are brought into shape, who allows what."""

    files: tuple[str, ...]  # in a data folder, without ending; the first that is there counts
    licence: str
    hub: Hub | None = None
    adapt: Adapt = lambda rows, _: rows
    get: str = ""  # how to get it, where the Hub does not have it as it is needed
    without: str = ""  # what can be measured without it

    @property
    def remedy(self) -> str:
        """What to do if it is missing."""
        remedy = self.get
        if self.hub is not None and not remedy:
            hub = self.hub.name
            remedy = f"Or leave out --data (KVTRIM_DATA): it is then read from the Hub, {hub}."
        return f"{remedy} {self.without}".strip()


def _longbench(task: str) -> Adapt:
    def adapt(rows: list[Row], _: Path | None) -> list[Row]:
        return [
            {
                "id": row.get("id", f"{task}/{number}"),
                "context": row["context"],
                "question": row["question"] if "question" in row else row["input"],
                "answers": list(row["answers"]),
                "all_classes": list(row.get("all_classes") or ()),
            }
            for number, row in enumerate(rows)
        ]

    return adapt


def _gsm8k(rows: list[Row], _: Path | None) -> list[Row]:
    return [
        {
            "id": row.get("id", number),
            "question": row["question"],
            "answer": row["answer"],
            "final": row.get(
                "final", row["answer"].rpartition("####")[2].strip().replace(",", "")
            ),
        }
        for number, row in enumerate(rows)
    ]


def _mmlu(rows: list[Row], _: Path | None) -> list[Row]:
    """Rows of every subject, in the alphabetical order of subjects."""
    found, seen = [], {}
    for row in sorted(rows, key=lambda row: row["subject"]):
        place = seen[row["subject"]] = seen.get(row["subject"], -1) + 1
        found.append(
            {
                "id": row.get("id", len(found)),
                "subject": row["subject"],
                "subject_row": row.get("subject_row", place),
                "question": row["question"],
                "choices": list(row["choices"]),
                "answer": row["answer"],
                "answer_key": "ABCD"[row["answer"]],
            }
        )
    return found


def _csqa(rows: list[Row], _: Path | None) -> list[Row]:
    found = []
    for number, row in enumerate(rows):
        if "answerKey" in row:  # the Hub's form
            key, choices = row["answerKey"], list(row["choices"]["text"])
            own = {"id": number, "source_id": row["id"], "concept": row["question_concept"]}
        else:
            key, choices = row["answer_key"], list(row["choices"])
            own = {name: row[name] for name in ("id", "source_id", "concept") if name in row}
        answer = {"choices": choices, "answer": "ABCDE".index(key), "answer_key": key}
        found.append({**own, "question": row["question"], **answer})
    return found


def _humaneval(rows: list[Row], _: Path | None) -> list[Row]:
    names = ("prompt", "entry_point", "canonical_solution", "test")
    return [
        {"id": row["id"] if "id" in row else row["task_id"], **{name: row[name] for name in names}}
        for row in rows
    ]


def _essays(rows: list[Row], _: Path | None) -> list[Row]:
    return [
        {"name": str(row.get("name", row.get("title", number))), "text": row["text"]}
        for number, row in enumerate(rows)
    ]


def _longgenbench(rows: list[Row], path: Path | None) -> list[Row]:
    """The template, with the text of the examples beside it as `examples`."""
    assert path is not None  # it is not on the Hub
    return [
        {**row, "examples": (path.parent / row["examples_file"]).read_text(encoding="utf-8")}
        for row in rows
    ]


def _squad(rows: list[Row], _: Path | None) -> list[Row]:
    """Answerable questions, `documents` = the paragraph with the answer; others beside it."""
    if rows and "data" in rows[0]:  # the official file
        rows = [
            {**asked, "title": article["title"], "context": paragraph["context"]}
            for article in rows[0]["data"]
            for paragraph in article["paragraphs"]
            for asked in paragraph["qas"]
        ]
    return [
        {
            "id": row["id"],
            "question": row["question"],
            "answers": _texts(row["answers"]),
            "documents": [row["context"]] if "context" in row else list(row["documents"]),
            "title": row["title"],
        }
        for row in rows
    ]


def _hotpotqa(rows: list[Row], _: Path | None) -> list[Row]:
    """`documents` = the ten paragraphs that come with a question, title line first."""
    return [
        {
            "id": row["id"] if "id" in row else row["_id"],
            "question": row["question"],
            "answers": list(row["answers"]) if "answers" in row else [row["answer"]],
            "documents": list(row["documents"]) if "documents" in row else _pages(row["context"]),
            "title": "",
        }
        for row in rows
    ]


def _pages(context: Any) -> list[str]:
    if isinstance(context, Mapping):  # the Hub's form; the official file has pairs
        context = zip(context["title"], context["sentences"], strict=True)
    return [f"{title}\n{''.join(sentences)}" for title, sentences in context]


def _texts(answers: Any) -> list[str]:
    """The different answers, in order, out of the Hub's, the official or a plain list."""
    found = answers["text"] if isinstance(answers, Mapping) else answers
    return list(dict.fromkeys(one["text"] if isinstance(one, Mapping) else one for one in found))


_COT8 = (
    "It is a list of the eight worked examples of Wei et al. 2022 (arXiv 2201.11903, table 20), "
    'each {"question": ..., "answer": ...}; an answer ends with "The answer is N."'
)
SOURCES: dict[str, Source] = {
    **{
        f"longbench/{task}": Source(
            (f"longbench/{task}", f"longbench_mini/{task}"),
            licence,
            Hub("zai-org/LongBench", archive="data.zip", file=f"data/{task}.jsonl"),
            _longbench(task),
        )
        for task, licence in LONGBENCH.items()
    },
    "gsm8k/test": Source(("gsm8k/test",), "MIT", Hub("openai/gsm8k", "main"), _gsm8k),
    "gsm8k/train": Source(
        ("gsm8k/train", "gsm8k/train_sample"), "MIT", Hub("openai/gsm8k", "main", "train"), _gsm8k
    ),
    "gsm8k/cot8": Source(("gsm8k/cot8",), "MIT", get=_COT8),
    "mmlu/dev": Source(("mmlu/dev",), "MIT", Hub("cais/mmlu", "all", "dev"), _mmlu),
    "mmlu/test": Source(("mmlu/test",), "MIT", Hub("cais/mmlu", "all"), _mmlu),
    "csqa/dev": Source(("csqa/dev",), "MIT", Hub("tau/commonsense_qa", split="validation"), _csqa),
    "csqa/train": Source(
        ("csqa/train", "csqa/train_sample"),
        "MIT",
        Hub("tau/commonsense_qa", split="train"),
        _csqa,
    ),
    "humaneval": Source(
        ("humaneval/HumanEval", "humaneval"), "MIT", Hub("openai/openai_humaneval"), _humaneval
    ),
    "longgenbench": Source(
        ("longgenbench/template",),
        "none stated",
        adapt=_longgenbench,
        get='It is {"system", "user_head", "examples_file", "user_middle", "question_item" (with '
        '{i} and {q}), "user_tail", "first_question_number"} of the prompts of '
        "Dominic789654/LongGenBench; examples_file is its gsm8k_prompt.txt, beside it.",
    ),
    "essays": Source(
        ("essays/paul_graham", "essays"),
        "all rights reserved (Paul Graham)",
        Hub("baber/paul_graham_essays", split="train"),
        _essays,
    ),
    "squad": Source(
        ("squad", "squad/dev-v2.0"),
        "CC BY-SA 4.0",
        Hub("rajpurkar/squad_v2", split="validation"),
        _squad,
        without=_OFFLINE,
    ),
    "hotpotqa": Source(
        ("hotpotqa", "hotpotqa/hotpot_dev_distractor_v1"),
        "CC BY-SA 4.0",
        Hub("hotpotqa/hotpot_qa", "distractor", "validation"),
        _hotpotqa,
        without=_OFFLINE,
    ),
    "jailbreakv": Source(
        ("jailbreakv", "jailbreakv/JailBreakV_28K"),
        "see its data card (gated)",
        get="It is JailBreakV_28K.csv of JailbreakV-28K/JailBreakV-28k on the Hub, after a login.",
    ),
}
