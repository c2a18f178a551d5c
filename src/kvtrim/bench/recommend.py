"""Which method and budget for a user's own prompts: fidelity to the full cache, and its cost.

An evaluation whose right answer is the full cache's own greedy one. Each prompt is read once;
every method and budget is fed that answer after it, and compared for each of its tokens:

    kl         divergence of the next-token distribution from the full cache's, nats per token
    agreement  share of tokens that both find the most likely

Under question-aware the answer's first token comes from the prompt's own pass and is not judged.
A budget is within tolerance if its mean divergence over the prompts is; a method's smallest budget
is the one that holds the fewest bytes, and the best method that whose smallest holds the fewest.

The seconds of evicting are what a budget takes by itself: what a policy observes in the prompt, or
in a probe, is not shared with its other budgets here.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from kvtrim import files
from kvtrim.api import Truncate, fit_context
from kvtrim.bench.candidates import Candidate, require_chunks
from kvtrim.bench.eval.decode import Branch, Reference, answers, fits, make_branch
from kvtrim.bench.eval.encode import Input
from kvtrim.bench.eval.grid import FULL
from kvtrim.bench.eval.prefill import Prefill, Ready
from kvtrim.bench.failures import Failure, attempt, finite
from kvtrim.errors import FileError, UsageError
from kvtrim.hf.attach import attach
from kvtrim.hf.models.architectures import window
from kvtrim.prompts import Frame, Prompt, encode_question, frame
from kvtrim.prompts.document import Document
from kvtrim.records import OK
from kvtrim.report.statistics import summary
from kvtrim.tasks.base import Sample

PROMPTS = (".jsonl", ".txt", "")
"""Files that prompts are read from, by their suffix."""

Line = dict[str, Any]
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Asked:
    """One of the user's prompts: a context and a question, or a text by itself."""

    context: str
    question: str = ""


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    cells: Sequence[Candidate]
    aware: bool = False
    new_tokens: int = 32  # of the reference answer
    tolerance: float = 0.05
    chat: bool | None = None
    truncate: Truncate = "error"
    prefill_chunk: int | None = None  # tokens of a pass, for methods that cut after each of them

    def __post_init__(self) -> None:
        """Refuse settings that nothing would act on."""
        require_chunks(self.cells, self.prefill_chunk)


def read(path: Path) -> list[Asked]:
    r"""The prompts of a file.

    A .jsonl file has an object per line with `context` and `question`, or with `prompt`, or a
    text; a .txt file (or one without a suffix) has a prompt per line, with \n for a line break.

    Raises:
        UsageError: it cannot be read, or a line of it is no prompt; the message names the line.
    """
    if path.suffix not in PROMPTS:
        raise UsageError(
            f"{path} is no list of prompts: give a .txt file with one prompt on a line, or a "
            '.jsonl file with {"context": "...", "question": "..."} or {"prompt": "..."} on each; '
            "a whole document is the context of one such line"
        )
    try:
        text = files.text_of(path, streams=True)
    except FileError as error:
        raise UsageError(str(error)) from None
    rows = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not rows:
        raise UsageError(f"{path} is empty; put one prompt on a line")
    if path.suffix != ".jsonl":
        return [Asked(line.replace("\\n", "\n")) for _, line in rows]
    return [_parse(line, f"{path}:{n}") for n, line in rows]


def _parse(line: str, where: str) -> Asked:
    try:
        row = files.parse(line)
    except ValueError as error:
        raise UsageError(f"{where}: this is not JSON ({error})") from None
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, dict):
        raise UsageError(f"{where}: expected an object or a text")
    context, question = row.get("context", row.get("prompt")), row.get("question", "")
    if not isinstance(context, str) or not isinstance(question, str) or not context.strip():
        raise UsageError(
            f'{where}: expected {{"context": "...", "question": "..."}} or {{"prompt": "..."}}'
        )
    return Asked(context, question)


def encode(model: Any, tokenizer: Any, plan: Plan, prompts: Sequence[Asked]) -> list[Prompt]:
    """Token ids of every prompt, all of them checked before the first is read.

    Raises:
        UsageError: a prompt that leaves no room for its answer.
    """
    around, made = frame(tokenizer, plan.chat), []
    for number, one in enumerate(prompts, start=1):
        own = around if one.question else Frame(around.before, "", around.after)
        asked = encode_question(tokenizer, own, one.question)
        room = window(model) - plan.new_tokens - len(asked)
        try:
            given = fit_context(tokenizer, own, one.context, room, plan.truncate)
        except UsageError as error:
            raise UsageError(f"prompt {number}: {error}") from None
        made.append(_part(given.with_question(asked)))
    return made


def _part(prompt: Prompt) -> Prompt:
    """The last token goes into the question where there is none, so that something follows."""
    if prompt.question:
        return prompt
    return Prompt(prompt.context[:-1], prompt.context[-1:], prompt.spans)


def measure(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    prompts: Sequence[Prompt],
    report: Report = lambda *_: None,
) -> list[Line]:
    """A line for every prompt, method and budget.

    Raises:
        UsageError: the full cache cannot read a prompt, for want of memory for example.
    """
    around, lines, total = frame(tokenizer, plan.chat), [], len(prompts) * (len(plan.cells) + 1)
    cells = [Candidate(FULL), *plan.cells]
    with attach(model):
        for number, prompt in enumerate(prompts):
            judge = _Judge(model, tokenizer, plan, _input(number, prompt, around))
            for place, (cell, ready) in enumerate(zip(cells, judge.ready(cells), strict=True)):
                report(f"prompt {number + 1}, {cell.said}", number * len(cells) + place, total)
                if place:
                    lines.append({"prompt": number} | judge.line(cell, ready))
                else:
                    judge.begin(ready)
    return lines


def _input(number: int, prompt: Prompt, around: Frame) -> Input:
    """A prompt as an evaluation reads it, whose right answer is not known yet."""
    sample = Sample(str(number), Document(""), "", ())
    return Input(sample, prompt.context, prompt.question, prompt.spans, [], around)


class _Judge:
    """One prompt, whose right answer is what the full cache makes of it."""

    def __init__(self, model: Any, tokenizer: Any, plan: Plan, given: Input):
        self._model, self._tokenizer, self._plan, self._given = model, tokenizer, plan, given
        self._skip = 1 if plan.aware else 0
        self._gold: list[int] = []
        self._reference = Reference()

    def ready(self, cells: Sequence[Candidate]) -> Iterator[Ready | Failure]:
        """The caches, one after the other; each budget observes the prompt for itself."""
        plan = self._plan
        own = self._model, self._tokenizer, self._given, plan.aware, True, plan.prefill_chunk
        return Prefill(*own, shared=False).each(cells)

    def begin(self, ready: Ready | Failure) -> None:
        """Take the full cache's own greedy answer, and how likely it finds each of its tokens."""
        if isinstance(ready, Failure):
            raise UsageError(f"the full cache: {ready.outcome}: {ready.reason}")
        branch = self._branch(ready)
        branch.full, mark = True, branch.cache.mark()
        most = self._plan.new_tokens
        (answer,) = answers(self._model, self._tokenizer, branch, most, ())
        branch.cache.rewind(mark)
        self._gold = [*answer.ids]
        fits(self._model, branch, self._gold, self._skip, self._reference)

    def line(self, cell: Candidate, ready: Ready | Failure) -> Line:
        """What a method and budget made of it."""
        key = {"method": cell.label, "keep": cell.keep, "tokens": len(self._gold)}
        found = ready if isinstance(ready, Failure) else attempt(lambda: self._judge(ready))
        if isinstance(found, Failure):
            return key | {"outcome": found.outcome, "reason": found.reason}
        return key | {"outcome": OK, "reason": ""} | found

    def _judge(self, ready: Ready) -> Line:
        name = "prefill_s" if ready.times.get("evict_s") is None else "evict_s"
        found = ready.held | {name: ready.times.get(name)}
        branch = self._branch(ready)
        (fit,) = fits(self._model, branch, self._gold, self._skip, self._reference)
        kl = None if fit.kl is None else finite(fit.kl)
        return found | {"kl": kl, "agreement": fit.agreement}

    def _branch(self, ready: Ready) -> Branch:
        """The cache after all that stands before the answer."""
        _, _, lead = self._given.read_first(self._plan.aware)
        tokens = len(self._given.ids)
        return make_branch(self._model, [ready.cache], [ready.logits], lead, tokens)


def rows(lines: Sequence[Line], tolerance: float) -> list[Line]:
    """One row per method and budget, means over the prompts.

    Raises:
        UsageError: no answer was long enough to judge anything.
    """
    if not any(line.get("kl") is not None for line in lines):
        why = next((line["reason"] for line in lines if line["reason"]), "")
        raise UsageError(
            why
            or "every answer is a single token, and under question-aware that one comes from "
            "the prompt's own pass; use --protocol question-agnostic"
        )
    cells = dict.fromkeys((line["method"], line["keep"]) for line in lines)
    return [_row(cell, lines, tolerance) for cell in cells]


def _row(cell: tuple[str, str], lines: Sequence[Line], tolerance: float) -> Line:
    own = [line for line in lines if (line["method"], line["keep"]) == cell]
    bad = next((line for line in own if line["outcome"] != OK), None)
    row: Line = dict(zip(("method", "keep"), cell, strict=True))
    if bad is not None:
        return row | {"outcome": bad["outcome"], "reason": bad["reason"], "within": False}
    good = [line for line in own if line["kl"] is not None]
    kl = summary(line["kl"] for line in good)
    row |= {"outcome": OK, "reason": "", "prompts": kl.n, "kl": kl.mean, "kl_se": kl.se}
    row["kl_interval"] = None if kl.low is None else [kl.low, kl.high]
    row["agreement"] = fmean(line["agreement"] for line in good)
    for name in ("held_bytes", "full_bytes", "entries", "evict_s", "prefill_s"):
        values = [line[name] for line in own if name in line]
        row[name] = fmean(values) if values else None
    return row | {"within": kl.mean is not None and kl.mean <= tolerance}


def smallest(found: Sequence[Line]) -> dict[str, Line | None]:
    """For every method the budget within tolerance that holds the fewest bytes, if one does."""
    methods = dict.fromkeys(row["method"] for row in found)
    return {method: best([row for row in found if row["method"] == method]) for method in methods}


def best(found: Sequence[Line]) -> Line | None:
    """The row within tolerance with the fewest bytes; of equals the one nearer to full."""
    within = [row for row in found if row["within"]]
    return min(within, key=lambda row: (row["held_bytes"], row["kl"]), default=None)


def digest(prompts: Sequence[Asked]) -> str:
    """What tells one set of prompts from another."""
    text = json.dumps([[one.context, one.question] for one in prompts])
    return hashlib.sha256(text.encode()).hexdigest()
