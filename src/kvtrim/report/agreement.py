"""Whether two folders that hold the same samples say the same of them, and how nearly.

The same request measured twice in the same way on the same machine gives the same figures. With
another batch size, or on another machine, sums are taken in another order: losses and KL may then
differ as far as rounding of the model's number format goes, and an answer may go another way from
a token on that was as likely as the next one. What is held does not depend on either.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isclose
from pathlib import Path
from typing import Any

from kvtrim.errors import UsageError

_SAME = 1e-6  # difference of figures of one machine and one batch size: threads race
_ROUNDING = {"float64": 1e-6, "float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}
"""How far figures of another batch size or machine may lie apart, in nats or as a share."""
_FIGURES = ("loss", "kl")

_TOLD = {
    "batch": "batches of {} and {}",
    "device": "devices {} and {}",
    "threads": "{} and {} threads",
    "packages": "other packages",
    "code": "other code of kvtrim",
}

Record = Mapping[str, Any]


@dataclass
class Shared:
    """What two runs both hold."""

    first: Path
    record: Record
    second: Path
    other: Record
    lines: int = 0
    answers: int = 0  # that went different ways
    largest: dict[str, float] = field(default_factory=dict)  # difference of each figure

    @property
    def differences(self) -> list[str]:
        """How the runs were measured differently, in words."""
        pairs = {"batch": (self.record.get("batch"), self.other.get("batch"))}
        machines = _machine(self.record), _machine(self.other)
        for name in _TOLD:
            pairs.setdefault(name, (machines[0].get(name), machines[1].get(name)))
        return [_TOLD[name].format(*pair) for name, pair in pairs.items() if pair[0] != pair[1]]

    def add(self, line: Any, other: Any) -> None:
        """Compare what they say of one sample, as lines of `folders`.

        Raises:
            UsageError: it differs by more than the way in which they were measured explains.
        """
        self.lines += 1
        explained = bool(self.differences)
        names = ("outcome",) if explained else ("outcome", "answer")
        wrong = [name for name in names if getattr(line, name) != getattr(other, name)]
        if line.figure("held_bytes") != other.figure("held_bytes"):
            wrong.append("held_bytes")
        same_answer = line.answer == other.answer
        if same_answer and not _close(line.score, other.score, 0.0):
            wrong.append("score")
        wrong += [name for name in _FIGURES if not self._agree(name, line, other)]
        if wrong:
            raise UsageError(
                f"{self.first} and {self.second} disagree about {line.method} {line.keep} on "
                f"{line.task}, sample {line.sample} ({', '.join(wrong)}): report them apart"
            )
        self.answers += not same_answer

    def _agree(self, name: str, line: Any, other: Any) -> bool:
        one, two = line.figure(name), other.figure(name)
        if one is not None and two is not None and one != two:
            self.largest[name] = max(self.largest.get(name, 0.0), abs(one - two))
        return _close(one, two, self._tolerance())

    def _tolerance(self) -> float:
        if not self.differences:
            return _SAME
        kinds = [str(record["model"].get("dtype")) for record in (self.record, self.other)]
        return max(_ROUNDING.get(kind, _ROUNDING["bfloat16"]) for kind in kinds)

    def remarks(self) -> list[str]:
        """What readers have to know: how far the two differ, and which of them is shown."""
        if not self.answers and not self.largest:
            return []
        how = ", ".join(self.differences) or "the same batch size on the same machine"
        far = [f"{name} by up to {value:.2g}" for name, value in sorted(self.largest.items())]
        gone = f"{self.answers} of {self.lines} answers" if self.answers else ""
        what = " and ".join(part for part in (gone, ", ".join(far)) if part)
        return [
            f"{self.second.name} holds {self.lines} of the same samples as {self.first.name}, "
            f"measured with {how}, and differs in {what}: rounding explains it, and what is shown "
            f"is of {self.first.name}"
        ]


def _machine(record: Record) -> Mapping[str, Any]:
    found = record.get("machine")
    return found if isinstance(found, Mapping) else {}


def _close(one: float | None, two: float | None, tolerance: float) -> bool:
    if one is None or two is None:
        return one is two
    return isclose(one, two, rel_tol=tolerance, abs_tol=tolerance)
