"""Which method and budget for a user's own prompts: fidelity to the full cache, and its cost.

Each prompt is read once. The full cache's own greedy answer is the reference; every method and
budget is fed that answer after the same prompt, and for each of its tokens compared:

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

import torch

from kvtrim import files
from kvtrim.bench.candidates import Candidate, read_prompt, require_chunks
from kvtrim.bench.eval.prefill import held, replayable
from kvtrim.bench.failures import OK, Failure, attempted, finite
from kvtrim.errors import FileError, UsageError
from kvtrim.hf.attach import attach
from kvtrim.hf.cache import Cache
from kvtrim.hf.generate import generate, synchronize
from kvtrim.hf.keyword import passing
from kvtrim.hf.replay import Recording, record
from kvtrim.prompts import (
    Frame,
    Prompt,
    encode_context,
    encode_ends,
    encode_question,
    frame,
    repeat_words,
)
from kvtrim.prompts.spans import without
from kvtrim.report.statistics import summary
from kvtrim.types import Float, Tensor

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
    truncate: str = "error"
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
    return [_asked(line, f"{path}:{n}") for n, line in rows]


def _asked(line: str, where: str) -> Asked:
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


def encoded(model: Any, tokenizer: Any, plan: Plan, prompts: Sequence[Asked]) -> list[Prompt]:
    """Token ids of every prompt, all of them checked before the first is read.

    Raises:
        UsageError: a prompt that leaves no room for its answer.
    """
    around = frame(tokenizer, plan.chat)
    window = model.config.get_text_config(decoder=True).max_position_embeddings
    made = []
    for number, one in enumerate(prompts, start=1):
        own = around if one.question else Frame(around.before, "", around.after)
        asked = encode_question(tokenizer, own, one.question)
        given = encode_context(tokenizer, own, one.context)
        room = window - plan.new_tokens - len(asked)
        if len(given) > room and plan.truncate != "middle":
            raise UsageError(
                f"prompt {number} has {len(given) + len(asked)} tokens and its answer up to "
                f"{plan.new_tokens}, the window {window}; shorten it, or cut its middle "
                "(--truncate middle)"
            )
        if len(given) > room:
            given = encode_ends(tokenizer, own, one.context, room)
        made.append(_parted(given.asked(asked)))
    return made


def _parted(prompt: Prompt) -> Prompt:
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
    """A line for every prompt, method and budget."""
    words, lines = repeat_words(tokenizer, frame(tokenizer, plan.chat)), []
    total = len(prompts) * (len(plan.cells) + 1)
    with attach(model):
        for number, prompt in enumerate(prompts):
            done = number * (len(plan.cells) + 1)
            report(f"prompt {number + 1}, full cache", done, total)
            ids = torch.tensor([prompt.ids if plan.aware else prompt.context], device=model.device)
            spans = prompt.spans
            if not plan.aware:
                spans = without(spans, len(prompt.context), len(prompt))
            recording = record(model, ids, spans, words)
            one = _Prompt(model, plan, prompt, recording)
            for place, cell in enumerate(plan.cells, start=1):
                report(f"prompt {number + 1}, {cell.method} {cell.keep}", done + place, total)
                lines.append({"prompt": number} | one.line(cell))
    return lines


class _Prompt:
    """One prompt that was read, with the full cache's answer and what it thought of it."""

    def __init__(self, model: Any, plan: Plan, prompt: Prompt, recording: Recording):
        self._model, self._prompt, self._recording = model, prompt, recording
        self._skip, self._chunk = 1 if plan.aware else 0, plan.prefill_chunk
        self._lead = [] if plan.aware else prompt.question
        ids = torch.tensor([prompt.ids], device=model.device)
        self._answer = self._greedy(ids, plan.new_tokens)
        self._true = self._log(recording.cache("full", 1), recording.logits)

    def _greedy(self, ids: Tensor, new_tokens: int) -> list[int]:
        """The full cache's answer."""
        if not self._lead:  # the prompt was read to its end, which gives the first token
            first = int(self._recording.logits[0].argmax())
            ids = torch.cat([ids, ids.new_tensor([[first]])], dim=1)
            ends = self._model.generation_config.eos_token_id
            if new_tokens == 1 or first in (ends if isinstance(ends, list) else [ends]):
                return [first]
            cache = self._recording.cache("full", 1)
            return [first, *generate(self._model, ids, cache, new_tokens - 1).token_ids]
        return generate(self._model, ids, self._recording.cache("full", 1), new_tokens).token_ids

    def _log(self, cache: Cache, logits: Float[Tensor, "B V"]) -> Float[Tensor, "T V"] | None:
        """Log-probabilities of the answer's tokens that are judged; None if there are none."""
        follow = [*self._lead, *self._answer[:-1]]
        found = [] if self._lead else [logits]
        cache.expect(len(self._prompt))
        if follow:
            keep = len(self._answer) - (0 if self._lead else 1)
            given = torch.tensor([follow], device=self._model.device)
            with torch.no_grad():
                out = self._model(input_ids=given, **passing(cache), logits_to_keep=keep)
            found.append(out.logits[0])
        judged = torch.cat(found)[self._skip :]
        return judged.float().log_softmax(dim=-1) if len(judged) else None

    def line(self, cell: Candidate) -> Line:
        """What a method and budget made of it."""
        key = {"method": cell.method, "keep": cell.keep, "tokens": len(self._answer)}
        found = attempted(lambda: self._measured(cell))
        if isinstance(found, Failure):
            return key | {"outcome": found.outcome, "reason": found.reason}
        return key | {"outcome": OK, "reason": ""} | found

    def _measured(self, cell: Candidate) -> Line:
        synchronize(self._model.device)
        start = perf_counter()
        own = self._recording.unshared() if replayable(cell) else None
        if own is not None:
            cache, logits = own.cache(cell.method, cell.keep, **cell.settings), own.logits
        else:
            cache, logits = self._alone(cell)
        synchronize(self._model.device)
        name = "evict_s" if own is not None else "prefill_s"
        found = held(cache) | {name: perf_counter() - start}
        log = self._log(cache, logits)
        if log is None or self._true is None:
            return found | {"kl": None, "agreement": None}
        kl = (self._true.exp() * (self._true - log)).sum(dim=-1).mean()
        same = (self._true.argmax(dim=-1) == log.argmax(dim=-1)).float().mean()
        return found | {"kl": finite(float(kl)), "agreement": float(same)}

    def _alone(self, cell: Candidate) -> tuple[Cache, Tensor]:
        """A method that changes the pass over the prompt reads it itself."""
        ids, spans = self._recording.ids, self._recording.spans
        cache = Cache(
            self._model,
            cell.method,
            cell.keep,
            prompt_tokens=ids.shape[1],
            spans=spans,
            words=self._recording.words,
            **cell.settings,
        )
        return cache, read_prompt(self._model, ids, cache, self._chunk)


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
