"""What an evaluation's lines come to: scores per sample, and a table of means with their errors.

Everything here is made from `inputs.jsonl` and `samples.jsonl` and can be made again: files are
replaced whole.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from kvtrim import records
from kvtrim.errors import UsageError
from kvtrim.files import replace
from kvtrim.prompts.document import Document
from kvtrim.records import (
    INPUTS,
    NEEDS_PERMISSION,
    OK,
    RECORD,
    SAMPLES,
    SCORES,
    InputLine,
    Line,
    SampleLine,
    ScoreLine,
)
from kvtrim.report.format import Cells, escape, prose, size
from kvtrim.report.statistics import mean, summary
from kvtrim.tasks import sandbox
from kvtrim.tasks.base import Sample, Task

TABLE, PAGE = "eval.json", "eval.md"
_COLUMNS = [("task", "left"), ("method", "left"), ("keep", "right"), ("samples", "right")]
_COLUMNS += [(name, "right") for name in ("score", "95 %", "loss", "KL", "held", "of full")]

_ROW = ("task", "method", "keep", "protocol")
_SINGLE = ("held_bytes", "full_bytes", "entries")


def require_programs(tasks: Iterable[Task], allowed: bool, unconfined: bool) -> None:
    """Refuse at once what the programs of these tasks could not be run with.

    Raises:
        UsageError: nothing to run unconfined, or no bubblewrap.
    """
    if unconfined and not allowed:
        raise UsageError("--unconfined says how --allow-code-execution runs programs; give both")
    if allowed and any(task.runs_code for task in tasks):
        sandbox.require(unconfined)


def derive(
    folder: Path,
    tasks: Iterable[Task],
    allow_code_execution: bool = False,
    unconfined: bool = False,
) -> list[Line]:
    """Score the answers of a run and write `scores.jsonl`, `eval.json` and `eval.md`.

    Returns:
        The rows of `eval.json`.

    Raises:
        UsageError: no run lies there, or one of other tasks.
    """
    if not (folder / RECORD).is_file():
        raise UsageError(f"{folder} holds no {RECORD}; name the folder of a kvtrim eval")
    record = records.record(folder / RECORD, records.EVAL)
    inputs, lines = records.read(folder, INPUTS), records.read(folder, SAMPLES)
    known = {task.name: task for task in tasks}
    found = list(score_answers(inputs, lines, known, allow_code_execution, unconfined))
    replace(folder / SCORES, records.text_of(found))
    rows = aggregate(inputs, lines, found)
    record |= {"without_samples": _without_samples(record, inputs), "refused": _refusals(lines)}
    made = json.dumps(record | {"rows": rows}, indent=1, ensure_ascii=False) + "\n"
    replace(folder / TABLE, made.encode())
    replace(folder / PAGE, page(record, rows).encode())
    return rows


def _without_samples(record: Line, inputs: Sequence[InputLine]) -> list[str]:
    """The tasks that were asked for and have no sample, with the reason, a sentence each."""
    why = "there are none"
    if record.get("fitting"):
        why = "--fitting left out all of them; ask for a larger --length, or without it"
    asked = {one["task"] for one in inputs}
    return [f"{name}: no samples: {why}" for name in record["tasks"] if name not in asked]


def score_answers(
    inputs: Sequence[InputLine],
    lines: Sequence[SampleLine],
    tasks: Mapping[str, Task],
    allowed: bool = False,
    unconfined: bool = False,
) -> Iterator[ScoreLine]:
    """A score for every line; none where nothing was answered, or code was not allowed to run.

    Args:
        allowed: code that the model wrote may be run, where a task is about that.
        unconfined: without bubblewrap, see `kvtrim.tasks.sandbox`.

    Raises:
        UsageError: a task that is not among these.
    """
    asked = records.by_sample(inputs, INPUTS)
    for line in lines:
        task = tasks.get(line["task"])
        if task is None:
            raise UsageError(f"there is no task {line['task']!r} to score with; name it in --task")
        outcome, score = line["outcome"], None
        if outcome == OK and task.runs_code and not allowed:
            outcome = NEEDS_PERMISSION
        elif outcome == OK:
            sample, answer = _sample(asked, line), line.get("answer")
            if answer is None:
                raise _lacks(SAMPLES, "the answer to ", line)
            with sandbox.allow(unconfined) if task.runs_code else nullcontext():
                score = float(task.score(answer, sample))
        own = records.key_of(line)
        yield {**own, "score": score, "metric": task.metric, "outcome": outcome}


def _sample(asked: Mapping[tuple[str, str], InputLine], line: SampleLine) -> Sample:
    """What a scorer needs of a line's sample."""
    given = asked.get((line["task"], line["sample"]))
    if given is None:
        raise _lacks(INPUTS, "", line)
    if "answers" not in given or "prefix" not in given or "extra" not in given:
        raise _lacks(INPUTS, "the right answers to ", line)
    return Sample(
        id=given["sample"],
        document=Document(""),
        question="",
        answers=tuple(given["answers"]),
        prefix=given["prefix"],
        group=given["group"],
        extra=given["extra"],
    )


def _lacks(name: str, what: str, line: SampleLine) -> UsageError:
    return UsageError(
        f"{name} lacks {what}sample {line['sample']!r} of {line['task']}; "
        "ask for the same again to measure it once more"
    )


def aggregate(
    inputs: Sequence[InputLine], lines: Sequence[SampleLine], scores: Sequence[ScoreLine]
) -> list[Line]:
    """Means of every task, method and budget: over all samples, then for each of its groups."""
    groups = {(one["task"], one["sample"]): one["group"] for one in inputs}
    found: dict[str, list[Line]] = {}
    for line, score in zip(lines, scores, strict=True):
        key = {name: line[name] for name in _ROW}
        own = groups.get((line["task"], line["sample"]), {})
        for group in ({}, own) if own else ({},):
            name = json.dumps(key | {"group": group}, sort_keys=True)
            found.setdefault(name, []).append({**line, "score": score["score"], "group": group})
    rows = [_row(some) for some in found.values()]
    return sorted(rows, key=lambda row: bool(row["group"]))


def _row(lines: Sequence[Line]) -> Line:
    """One row of the table."""
    row = {name: lines[0][name] for name in (*_ROW, "group")}
    good = [line for line in lines if line["outcome"] == OK]
    row |= {"n": len(good), "failed": len(lines) - len(good)}
    for name in ("score", "loss", "kl"):
        found = summary(line[name] for line in good if line[name] is not None)
        row |= {name: found.mean, f"{name}_se": found.se}
        if name == "score":
            row["score_interval"] = None if found.low is None else [found.low, found.high]
    for name in _SINGLE:
        row[name] = mean(line[name] for line in good)
    return row


def cells(rows: Sequence[Line]) -> Cells:
    """The rows of whole tasks; scores are times 100."""
    made = []
    for row in rows:
        if row["group"]:
            continue
        failed = f" ({row['failed']} not)" if row["failed"] else ""
        held, full = row["held_bytes"], row["full_bytes"]
        made.append(
            [
                row["task"],
                row["method"],
                row["keep"] or "all",
                f"{row['n']}{failed}",
                _with_error(row["score"], row["score_se"], 100, 1),
                _interval(row["score_interval"]),
                _with_error(row["loss"], row["loss_se"], 1, 3),
                _with_error(row["kl"], row["kl_se"], 1, 3),
                size(None if held is None else round(held)),
                f"{100 * held / full:.1f}%" if held is not None else "-",
            ]
        )
    return Cells(_COLUMNS, made)


def _refusals(lines: Sequence[SampleLine]) -> list[str]:
    """Why figures are missing: a sentence for each task, method, budget and outcome."""
    found: dict[tuple[str, ...], list[str]] = {}
    for line in lines:
        if line["outcome"] != OK:
            key = line["task"], line["method"], line["keep"], line["outcome"]
            found.setdefault(key, []).append(line.get("reason") or "")
    return [
        f"{' '.join(key[:3]).strip()}: {len(why)} {key[3]}: {why[0]}" for key, why in found.items()
    ]


def page(record: Line, rows: Sequence[Line]) -> str:
    """The table in Markdown, and what was measured."""
    machine = record["machine"]
    model = record["model"]
    about = (
        f"{escape(model['name'])} ({model['dtype']}), {record['protocol']}, greedy; "
        f"kvtrim {machine['kvtrim']}, {machine['device']}. Scores are 0 to 100, ± standard error; "
        "95 %: bootstrap interval of the mean. Loss: nats per token of the right answer. KL: from "
        "the full cache, nats. Held: bytes measured after the prompt.\n\n"
    )
    if record.get("truncate_at"):
        about = f"Prompts cut to the halves of {record['truncate_at']} tokens. {about}"
    if record.get("chat") is not None:
        about = f"{'All' if record['chat'] else 'No'} prompts in the chat template. {about}"
    if record.get("max_new_tokens"):
        about = f"Answers of at most {record['max_new_tokens']} tokens. {about}"
    empty = "".join(f"\n{prose(line)}\n" for line in record["without_samples"])
    return f"# Evaluation\n\n{about}{cells(rows).markdown()}{empty}"


def _with_error(value: float | None, error: float | None, scale: float, places: int) -> str:
    if value is None:
        return "-"
    behind = "" if error is None else f" ± {scale * error:.{places}f}"
    return f"{scale * value:.{places}f}{behind}"


def _interval(limits: Sequence[float] | None) -> str:
    if limits is None:
        return "-"
    return f"{100 * limits[0]:.1f} to {100 * limits[1]:.1f}"


scored = score_answers
"""Its old name, for one version."""
