"""`speed --batch max`: the largest batch that fits into a given memory."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtrim.cli import output
from kvtrim.errors import UsageError

if TYPE_CHECKING:
    from kvtrim.bench.candidates import Candidate
    from kvtrim.bench.speed.max_batch import Search
    from kvtrim.records.journal import Journal

LARGEST = "max"


def wanted(
    batch: list[str] | None, memory: str | None, peer: list[str] | None, chunk: int | None
) -> int | None:
    """Bytes to fill, if the largest batch is asked for.

    Raises:
        UsageError: one of --batch max and --memory without the other, or what it cannot do.
    """
    if batch != [LARGEST]:
        if memory is not None or LARGEST in (batch or []):
            raise UsageError("--batch max and --memory SIZE go together, without another --batch")
        return None
    if memory is None:
        raise UsageError("--batch max needs to know what to fill: --memory 40GiB")
    if peer or chunk is not None:
        raise UsageError(
            "--batch max reads whole prompts of its own; drop --peer, --prefill-chunk"
        )
    from kvtrim.methods.keep import Keep

    size = Keep.parse(memory)
    if size.kind != "bytes":
        raise UsageError(f"--memory {memory}: give a size, as 40GiB or 512MiB")
    return int(size.amount)


def batches(batch: list[str] | None) -> tuple[int, ...]:
    """Numbers of prompts at once. Raises UsageError if one is none."""
    for each in batch or []:
        if not each.isdecimal() or int(each) < 1:
            raise UsageError(f"--batch {each}: give a number from 1 on, or {LARGEST}")
    return tuple(int(each) for each in batch or ["1"])


def plan(lengths: tuple[int, ...], memory: int, new_tokens: int, capture: bool) -> "Search":
    """What to search for."""
    from kvtrim.bench.speed.max_batch import Search

    return Search(lengths, memory, new_tokens, capture=capture)


def fill(
    model: Any,
    plan: "Search",
    chosen: "list[Candidate]",
    journal: "Journal",
    record: dict[str, Any],
    out: Path | None,
    json: bool,
) -> None:
    """Search, write the files, print the table or the record."""
    from kvtrim.bench.speed.max_batch import search
    from kvtrim.files import replace
    from kvtrim.report import max_batch as report

    with output.busy("searching") as say:
        search(model, plan, chosen, journal, lambda what: say(f"trying {what}"))
    rows = report.rows(journal.lines)
    if out is not None:
        replace(out / "largest.md", report.page(record, rows).encode())
    if json:
        output.print_json(record | {"rows": rows})
        return
    columns, cells = report.table(rows)
    output.table(report.title(record), columns, cells, wide=True)
