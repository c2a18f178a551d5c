"""FastKV's published times as ratios to its own full cache, beside what was measured here.

The paper gives seconds and tokens per second on hardware that it does not name. Ratios to the full
cache of the same table can be set beside ours, seconds cannot.
"""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from math import log
from typing import Any

from kvtrim.papers.recipe import short_model
from kvtrim.report.format import Cells, ratio
from kvtrim.report.speed import Row

_COLUMNS = [("published", "left"), ("method", "left"), ("keep", "right"), ("tokens", "right")]
_COLUMNS += [
    ("ratio", "right"),
    ("ours at tokens", "right"),
    ("keep", "right"),
    ("ratio", "right"),
]
ABOUT = (
    "Published: FastKV: KV Cache Compression for Fast Long-Context Processing with "
    "Token-Selective Propagation (arXiv 2502.01068), tables 5 to 7, as ratios to the full cache "
    "of the same table; hardware is not named, and the budget of its first-token times is not "
    "either. Ours: this run, to plain transformers, at the nearest length and budget, one prompt "
    "at a time. First token: less is faster. Tokens per second: more is faster; the compressed "
    "methods' table names no length, so it is set against the full cache at the length shown."
)
_MODELS = {"mistral-nemo-12b": "Mistral-Nemo-12B-Instruct"}  # every other: the first table's


def fastkv() -> dict[str, Any]:
    """The published tables."""
    path = files("kvtrim") / "papers" / "fastkv.json"
    return json.loads(path.read_text(encoding="utf-8"))


def cells(model: Mapping[str, Any], rows: Sequence[Row], only_measured: bool = False) -> Cells:
    """A line per published figure: time to first token, then tokens per second.

    Args:
        model: of the run's record; the tables of the same model are taken, else Llama-3.1-8B's.
        only_measured: leave out methods that this run has not measured, and lengths that are not
            the nearest to one of its own.
    """
    own = model.get("config") or short_model(str(model.get("name", ""))).removesuffix("-instruct")
    wanted = _MODELS.get(own, "Llama-3.1-8B-Instruct")
    tables = [t for t in fastkv()["tables"] if t["model"] == wanted]
    firsts = next(t["rows"] for t in tables if t["benchmark"] == "ttft")
    rates = [row for t in tables if t["benchmark"] == "throughput" for row in t["rows"]]
    measured = [row for row in rows if row.get("ttft_ratio") and row["batch"] == 1]
    lengths = {row["length"] for row in measured}
    near = {_nearest_context(firsts, length) for length in lengths}
    shown = [row for row in firsts if row["context"] in near or not only_measured]
    lines = [_first(wanted, row, firsts, measured) for row in shown if row["method"] != "full"]
    full = {row["context"]: row for row in rates if row["method"] == "full"}
    longest = full[_nearest_context(list(full.values()), max(lengths, default=0))]
    lines += [_rate(wanted, row, longest, measured) for row in rates if row["method"] != "full"]
    known = {row["method"] for row in measured}
    return Cells(_COLUMNS, [line for line in lines if line[1] in known or not only_measured])


def section(model: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The Markdown of it."""
    return f"## Published beside measured\n\n{ABOUT}\n\n{cells(model, rows).markdown()}"


def _first(model: str, row: Row, table: Sequence[Row], measured: Sequence[Row]) -> list[str]:
    full = next(r for r in table if r["method"] == "full" and r["context"] == row["context"])
    own = _nearest(measured, row["method"], row["context"], row["keep"])
    start = [f"{model}, first token", row["method"], "-", f"{row['context']}"]
    found = own["ttft_ratio"] if own else None
    return [*start, ratio(row["value"] / full["value"]), *_place(own), ratio(found)]


def _rate(model: str, row: Row, full: Row, measured: Sequence[Row]) -> list[str]:
    own = _nearest(measured, row["method"], full["context"], row["keep"])
    start = [f"{model}, tokens/s", row["method"], f"{row['keep']}", f"{full['context']}"]
    found = 1 / own["token_ratio"] if own else None
    return [*start, ratio(row["value"] / full["value"]), *_place(own), ratio(found)]


def _place(own: Row | None) -> list[str]:
    return [f"{own['length']}", own["keep"] or "all"] if own else ["-", "-"]


def _nearest(rows: Sequence[Row], method: str, length: int, keep: int | None) -> Row | None:
    """Our row of the method that is nearest in length, then in budget (the smallest if unsaid)."""
    mine = [row for row in rows if row["method"] == method and row["entries"]]
    wanted = keep or 1
    return min(
        mine,
        key=lambda r: (_apart(r["length"], length), _apart(r["entries"], wanted)),
        default=None,
    )


def _nearest_context(rows: Sequence[Row], length: int) -> int:
    return min((row["context"] for row in rows), key=lambda context: _apart(context, length))


def _apart(one: float, other: float) -> float:
    return abs(log(max(one, 1) / max(other, 1)))
