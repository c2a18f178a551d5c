"""What a benchmark is: samples made of strings, how long an answer may be, what it is worth."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvtrim.prompts.document import Document


@dataclass(frozen=True)
class Sample:
    """One prompt, cut where a cache may be compressed before the rest is known, and its answers.

    The prompt is `document.text + question`, inside the chat template where the task uses it, then
    `prefix`: nothing else is put in between. Named parts (`shots`) are spans of the document.
    """

    id: str  # unique in its task, the same in every run
    document: Document
    question: str  # what follows the document, separating blank lines included
    answers: tuple[str, ...]  # any of them is right; the first one's likelihood is measured
    prefix: str = ""  # how the answer begins: given, so the model goes on from here
    group: Mapping[str, Any] = field(default_factory=dict)  # columns of tables: length, depth
    extra: Mapping[str, Any] = field(default_factory=dict)  # what else its scorer needs, as JSON


@dataclass(frozen=True)
class Request:
    """What is wanted of a task."""

    rows: "Callable[[str], list[dict[str, Any]]]"  # the rows of a data file, see `tasks.rows`
    tokens: Callable[[str], int]  # how many tokens the model's tokenizer makes of a text
    length: int = 4096  # tokens of a whole prompt, answer included, where prompts are made
    limit: int | None = None  # samples of the task; None = all (where prompts are made: 100)
    seed: int = 0


@dataclass(frozen=True)
class Task:
    """A benchmark as data: where prompts come from, and what an answer is worth."""

    name: str
    version: int  # counted up whenever a prompt or a score changes
    about: str  # one sentence: what it asks for
    source: str  # paper section, or repository@commit, of prompt and scorer
    metric: str  # name of what `score` gives
    max_new_tokens: int
    samples: Callable[[Request], Iterator[Sample]]
    score: Callable[[str, Sample], float]  # an answer's worth, 0 to 1
    chat: bool | None = None  # the chat template: None = where there is one, False = never
    stop: tuple[str, ...] = ()  # the answer ends before the first of these
    data: tuple[str, ...] = ()  # names of the data files that it reads, see `tasks.rows`
    shots: str = ""  # the rule by which the examples in front of a question are chosen
    min_new_tokens: int = 0  # the answer may not end before it has so many
    runs_code: bool = False  # `score` runs what the model wrote; needs --allow-code-execution
