"""Result folders as they lie on disk: runs of `kvtrim eval` and of `kvtrim speed`.

An eval folder holds `run.json`, `inputs.jsonl`, `samples.jsonl` and `scores.jsonl`; a speed folder
`run.json` and `speed.jsonl`. A folder of folders (a sweep's) holds any number of both. Everything
is read from the lines of single samples: tables are never made of other tables.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from kvtrim import records
from kvtrim.errors import UsageError
from kvtrim.methods.variant import Variant
from kvtrim.records import (
    INPUTS,
    OK,
    RECORD,
    SAMPLES,
    SCORES,
    SPEED,
    BatchLine,
    InputLine,
    SampleLine,
    ScoreLine,
    SpeedLine,
)
from kvtrim.report import agreement

EVERY_LENGTH = "all-lengths"
_KEY = ("task", "sample", "method", "keep")
_FIGURES = ("loss", "kl", "held_bytes", "full_bytes", "entries", "prompt_tokens", "new_tokens")


@dataclass(frozen=True)
class Line:
    """What one method and budget made of one sample."""

    task: str
    sample: str
    method: str  # with its settings, if it had any: "snapkv:window=16"
    keep: str  # "" for the full cache
    score: float | None  # 0 to 1; None where there is none
    figures: Mapping[str, float | None]
    group: Mapping[str, Any]
    answer: str
    outcome: str
    reason: str
    truncated: bool  # the middle of its document was cut out
    prompt: str = ""  # SHA-256 of its token ids

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What tells it apart from every other line of its section."""
        return self.task, self.sample, self.method, self.keep

    def figure(self, name: str) -> float | None:
        """The score or another figure."""
        return self.score if name == "score" else self.figures.get(name)


@dataclass(frozen=True)
class Run:
    """An eval folder: its record and its lines."""

    folder: Path
    record: Mapping[str, Any]
    lines: Sequence[Line]
    unscored: int = 0  # answers that scores.jsonl says nothing about

    @property
    def setup(self) -> tuple[str, str, str]:
        """Model, protocol and length: only runs that share them belong in one table."""
        model = self.record["model"]
        length = self.record.get("length")
        return model["name"], self.record["protocol"], "" if length is None else str(length)


@dataclass(frozen=True)
class SpeedRun:
    """A speed folder: its record and the lines of its journal."""

    folder: Path
    record: Mapping[str, Any]
    lines: Sequence[SpeedLine]
    batches: Sequence[BatchLine] = ()  # those of a search for the largest batch

    @property
    def is_search(self) -> bool:
        """Whether the largest batch was searched for, in place of measuring given ones."""
        return "memory" in self.record["plan"]


@dataclass(frozen=True)
class Section:
    """Everything measured on one model under one protocol at one length."""

    model: str
    protocol: str
    length: str
    runs: Sequence[Run]
    lines: Sequence[Line] = field(repr=False)
    short: str = ""  # the model's name in the names of tables; else the last part of its path
    remarks: Sequence[str] = ()  # on folders that hold the same samples

    @property
    def slug(self) -> str:
        """Its name in the names of tables: smollm2/question-agnostic/2048."""
        short = self.short or self.model.strip("/").rpartition("/")[2]
        parts = [short, self.protocol, self.length]
        return "/".join(part.replace(" ", "-") for part in parts if part)

    @property
    def title(self) -> str:
        """Its name for readers."""
        length = f", prompts of up to {self.length} tokens" if self.length else ""
        length = ", needles at all lengths" if self.length == EVERY_LENGTH else length
        return f"{self.model}, {self.protocol}{length}"

    def about(self, task: str) -> Mapping[str, Any]:
        """What the runs' records say of a task."""
        known = (run.record["tasks"].get(task) for run in self.runs)
        return next((found for found in known if found), {})


def read_results(folders: Sequence[Path]) -> tuple[list[Section], list[SpeedRun]]:
    """Everything that lies in the folders, runs of one setup joined.

    Raises:
        UsageError: a folder without results, a file that cannot be read, or two folders that say
            different things about the same sample.
    """
    evals: list[Run] = []
    speeds: list[SpeedRun] = []
    for folder in folders:
        places = list(_places(folder))
        if not places:
            raise UsageError(
                f"{folder} holds no results: name the --out folder of kvtrim eval, sweep or speed"
            )
        for place in places:
            if (place / SAMPLES).exists():
                evals.append(_run(place, records.record(place / RECORD, records.EVAL)))
            elif (place / SPEED).exists():
                speeds.append(_speed_run(place))
    if not any(run.lines for run in evals) and not speeds:
        named = ", ".join(map(str, folders))
        raise UsageError(
            f"nothing was measured in {named} yet; a run that was cut off goes on when asked for "
            "again"
        )
    setups = dict.fromkeys(run.setup for run in evals)
    sections = [_join(setup, [run for run in evals if run.setup == setup]) for setup in setups]
    return [section for section in sections if section.lines], speeds


def empty(folders: Sequence[Path]) -> list[Path]:
    """The folders of runs in which nothing was measured."""
    places = [place for folder in folders for place in _places(folder)]
    return [
        place
        for place in places
        if not any(records.first(place / name) for name in (SAMPLES, SPEED))
    ]


def across_lengths(sections: Sequence[Section], wanted: Callable[[str], bool]) -> list[Section]:
    """The sections with the wanted tasks taken out and joined where there are several lengths.

    Heat maps of needles need all lengths together.
    """
    groups: dict[tuple[str, str], list[Section]] = {}
    for section in sections:
        if any(wanted(line.task) for line in section.lines):
            groups.setdefault((section.model, section.protocol), []).append(section)
    made, moved = [], []
    for (model, protocol), own in groups.items():
        if len(own) > 1:
            moved += own
            runs = [run for section in own for run in section.runs]
            lines = [line for section in own for line in _at_length(section, wanted)]
            short = own[0].short
            remarks = dict.fromkeys(each for section in own for each in section.remarks)
            made.append(Section(model, protocol, EVERY_LENGTH, runs, lines, short, [*remarks]))
    left = [_without(section, wanted) if section in moved else section for section in sections]
    return [section for section in [*left, *made] if section.lines]


def _at_length(section: Section, wanted: Callable[[str], bool]) -> list[Line]:
    """The wanted tasks' lines, with samples that no other length has."""
    found = [line for line in section.lines if wanted(line.task)]
    return [replace(line, sample=f"{line.sample} at {section.length}") for line in found]


def _without(section: Section, wanted: Callable[[str], bool]) -> Section:
    return replace(section, lines=[line for line in section.lines if not wanted(line.task)])


def _places(folder: Path) -> Iterator[Path]:
    """The folder itself, or every folder in it that holds a run."""
    if (folder / RECORD).exists():
        yield folder
        return
    for inner in sorted(folder.iterdir() if folder.is_dir() else []):
        if inner.is_dir():
            yield from _places(inner)


def _speed_run(folder: Path) -> SpeedRun:
    record, found = records.record(folder / RECORD, records.TIMED), records.read(folder, SPEED)
    timed = [cast(SpeedLine, line) for line in found if "fits" not in line]
    return SpeedRun(folder, record, timed, [line for line in found if "fits" in line])


def _run(folder: Path, record: Mapping[str, Any]) -> Run:
    inputs = records.by_sample(records.read(folder, INPUTS), folder / INPUTS)
    scores = {tuple(row[k] for k in _KEY): row for row in records.read(folder, SCORES)}
    named = {(one["method"], one.get("keep") or ""): one for one in record.get("methods", [])}
    lines, unscored = [], 0
    for row in records.read(folder, SAMPLES):
        key = tuple(row[name] for name in _KEY)
        own = inputs.get((row["task"], row["sample"]))
        lines.append(_line(row, own, scores.get(key), named))
        unscored += key not in scores
    return Run(folder, record, lines, unscored)


def _line(
    row: SampleLine,
    own: InputLine | None,
    score: ScoreLine | None,
    named: Mapping[tuple[str, str], Mapping[str, Any]],
) -> Line:
    method, keep = row["method"], row["keep"] or ""
    return Line(
        task=row["task"],
        sample=str(row["sample"]),
        method=_label(method, named.get((method, keep), {})),
        keep=keep,
        score=None if score is None else score["score"],
        figures={name: row.get(name) for name in _FIGURES},
        group={} if own is None else own["group"],
        answer=row.get("answer") or "",
        outcome=row.get("outcome", OK),
        reason=row.get("reason") or _why(score),
        truncated=own is not None and own.get("truncated", False),
        prompt="" if own is None else own.get("sha256", ""),
    )


def _label(method: str, about: Mapping[str, Any]) -> str:
    """The method with its settings, which lines of earlier runs do not name."""
    known = "name" in about or method == "full"
    return method if known else str(Variant(method, about.get("settings") or {}))


def _why(score: ScoreLine | None) -> str:
    """Why there is no score where the answer is there."""
    outcome = OK if score is None else score.get("outcome", OK)
    return "" if outcome == OK else outcome


def _join(setup: tuple[str, str, str], runs: Sequence[Run]) -> Section:
    """One section; a sample that several folders hold counts once, as the first one has it.

    Raises:
        UsageError: two folders have other prompts of one sample, or disagree about it.
    """
    _require_same_prompts(runs)
    lines: dict[tuple[str, str, str, str], tuple[Line, Run]] = {}
    shared: dict[tuple[Path, Path], agreement.Shared] = {}
    for run in runs:
        for line in run.lines:
            there, first = lines.setdefault(line.key, (line, run))
            if first is not run:
                own = agreement.Shared(first.folder, first.record, run.folder, run.record)
                shared.setdefault((first.folder, run.folder), own).add(there, line)
    remarks = [remark for each in shared.values() for remark in each.remarks()]
    return Section(*setup, runs, [line for line, _ in lines.values()], remarks=remarks)


def _require_same_prompts(runs: Sequence[Run]) -> None:
    """Methods stand in one table only where they read the same, token by token."""
    met: dict[tuple[str, str], tuple[str, Run]] = {}
    for run in runs:
        for line in run.lines:
            prompt, first = met.setdefault((line.task, line.sample), (line.prompt, run))
            if prompt and line.prompt and prompt != line.prompt:
                raise UsageError(
                    f"{first.folder} and {run.folder} have different prompts of sample "
                    f"{line.sample} of {line.task} (another template, version or cut): report "
                    "them apart"
                )
