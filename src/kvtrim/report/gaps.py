"""What a report lacks because a run did not come to its end, and how to finish it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from kvtrim.report.results import Run, Section

_AGAIN = "ask kvtrim eval (or sweep) for the same again to finish it"


def notes(empty: Sequence[Path], sections: Sequence[Section]) -> list[str]:
    """A sentence for everything that is missing.

    Args:
        empty: folders of runs that hold no samples.
    """
    found = [f"{folder} holds no samples yet; {_AGAIN}" for folder in empty]
    runs = [run for section in sections for run in section.runs]
    found += [note for run in runs for note in of(run, str(run.folder))]
    return found + [remark for section in sections for remark in section.remarks]


def of(run: Run, name: str) -> Iterator[str]:
    """What one run lacks.

    Args:
        name: what its folder is called.
    """
    if run.unscored:
        yield f"{name} has no scores of {run.unscored} of {len(run.lines)} answers; {_AGAIN}"
    met = {line.task for line in run.lines}
    without = [task for task in run.record["tasks"] if task not in met]
    if without:
        left = (
            " (those that would have to be cut were left out)" if run.record.get("fitting") else ""
        )
        yield f"{name} has no samples of {', '.join(without)}{left}"
