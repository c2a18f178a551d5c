"""RULER's questions: SQuAD and HotpotQA, the paragraphs with the answer among others.

Source: NVIDIA/RULER, scripts/data/synthetic/qa.py and constants.py.
Ours:   paragraphs are shuffled anew for every sample (official: with one seed for all, so that the
        ones with the answer stand at the same places), and those with the answer always remain.
"""

from dataclasses import dataclass
from typing import Any

from kvtrim.errors import UsageError
from kvtrim.prompts.document import Document
from kvtrim.tasks.base import Request, Sample
from kvtrim.tasks.ruler.words import Draw

ANSWER = 32  # new tokens
_TASK = (
    "Answer the question based on the given documents. "
    "Only give me the answer and do not output any other words."
)


@dataclass(frozen=True)
class Library:
    """The questions of a data set, and all of its paragraphs."""

    asked: list[dict[str, Any]]
    pages: list[str]
    near: dict[str, list[str]]  # paragraphs of each title, for SQuAD's questions


def library(request: Request, name: str) -> Library:
    """What the rows of a data set give; unanswerable questions are left out.

    Raises:
        UsageError: no question can be answered.
    """
    rows = request.rows(name)
    near: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["title"]:
            near.setdefault(row["title"], {}).update(dict.fromkeys(row["documents"]))
    asked = [row for row in rows if row["answers"]]
    if not asked:
        raise UsageError(f"{name}: no row has an answer; take the rows of the official data set")
    pages = sorted({page for row in rows for page in row["documents"]})
    return Library(asked, pages, {title: list(of) for title, of in near.items()})


def sample(known: Library, row: dict[str, Any], draw: Draw, count: int) -> Sample:
    """A question with `count` documents: its own, then those of its title, then any."""
    own = list(dict.fromkeys(row["documents"]))
    near = [page for page in known.near.get(row["title"], []) if page not in own]
    draw.shuffle(near)
    chosen = dict.fromkeys([*own, *near][: max(count, len(own))])
    while len(chosen) < min(count, len(known.pages)):
        chosen[draw.choice(known.pages)] = None
    pages = list(chosen)
    draw.shuffle(pages)
    before = f"{_TASK}\n\nThe following are given documents.\n\n"
    titled = [f"Document {place}:\n{page}" for place, page in enumerate(pages, 1)]
    spans, start = [], len(before)
    for text in titled:
        spans.append((start, start + len(text)))
        start += len(text) + 2
    return Sample(
        id="",
        document=Document(before + "\n\n".join(titled), {"passages": spans}),
        question=f"\n\n{_TASK}\n\nQuestion: {row['question']}",
        answers=tuple(row["answers"]),
        prefix=" Answer:",
    )
