"""The largest batches that fit into a memory, from the journal of `kvtrim speed --batch max`."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvtrim.report.format import Cells, prose, ratio, seconds, size

PLAIN = "transformers"
ABOUT = (
    "Prompts are read one after the other, their caches decode together; in use is the most at "
    "any moment of both, from measured peaks. Tokens per second are those of the median step."
)
Row = dict[str, Any]


def rows(journal: Sequence[Row]) -> list[Row]:
    """One row per length, method and budget: its largest batch, and ratios to plain."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for line in journal:
        groups.setdefault((line["length"], line["method"], line["keep"]), []).append(line)
    found: dict[tuple[Any, ...], Row] = {}
    for key, lines in groups.items():
        fitting = [line for line in lines if line["fits"]]
        best = max(fitting, key=lambda line: line["batch"]) if fitting else None
        failed = [line.get("reason", "too large") for line in lines if not line["fits"]]
        row = best or {"batch": 0, "reason": failed[0]}
        found[key] = dict(zip(("length", "method", "keep"), key, strict=True)) | row
    for (length, _, _), row in found.items():
        plain = found.get((length, PLAIN, ""), {})
        for name in ("batch", "tokens_per_s"):
            both = row.get(name) and plain.get(name)
            row[f"{name}_ratio"] = row[name] / plain[name] if both else None
    return list(found.values())


def table(rows: Sequence[Row]) -> Cells:
    """The figures."""
    names = ("largest batch", "to plain", "tokens/s", "to plain", "per step", "held", "in use")
    columns = [("tokens", "right"), ("method", "left"), ("keep", "right")]
    columns += [(name, "right") for name in names]
    return Cells(columns, [_texts(row) for row in rows])


def _texts(row: Row) -> list[str]:
    start = [f"{row['length']}", row["method"], row["keep"] or "all"]
    if not row["batch"]:
        return [*start, "none", "-", row["reason"], "-", "-", "-", "-"]
    return [
        *start,
        f"{row['batch']}",
        ratio(row["batch_ratio"]),
        f"{row['tokens_per_s']:.1f}",
        ratio(row["tokens_per_s_ratio"]),
        seconds(row["token_s"]),
        size(row["held_bytes"]),
        size(row["used_bytes"]),
    ]


def title(record: Mapping[str, Any]) -> str:
    """What was measured where, in a line."""
    machine, plan = record["machine"], record["plan"]
    return (
        f"{record['model']['name']}, {record['model']['dtype']}, on {machine['device']}, "
        f"{machine['threads']} CPU thread{'s' * (machine['threads'] > 1)}: the largest batch that "
        f"decodes within {size(plan['memory'])}, weights included"
    )


def page(record: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """`largest.md`."""
    return f"# Largest batches\n\n{prose(title(record))}.\n\n{ABOUT}\n\n{table(rows).markdown()}"
