"""The journal of `kvtrim speed` as rows (medians, ratios, floors), and rows as a table.

A row is a (batch, length, method, keep). Its figures are medians over the rounds; ranges are the
least and the most; ratios are medians of the rounds' own ratios to plain transformers, which a
drifting machine disturbs least.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from kvtrim.records import OK
from kvtrim.report.format import Cells, prose, ratio, seconds, size, spread

PLAIN = "transformers"
NOT_YET = "not yet"  # timed
Row = dict[str, Any]
_EARLIER = {"captured": False, "capture_s": 0.0}  # lines of runs before steps could be captured
_KEY = ("batch", "length", "method", "keep")
_TIMES = {"ttft_s": "ttft", "token_s": "token", "end_to_end_s": "end_to_end"}
_LAST = ("held_bytes", "full_bytes", "entries", "captured")


def rows(journal: Sequence[Mapping[str, Any]], limits: Mapping[str, float]) -> list[Row]:
    """Rows in the order in which they were first measured."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for line in journal:
        groups.setdefault(tuple(line[name] for name in _KEY), []).append({**_EARLIER, **line})
    made = []
    for key, lines in groups.items():
        plain = groups.get((*key[:2], PLAIN, ""), [])
        row = dict(zip(_KEY, key, strict=True)) | _figures(lines, plain)
        made.append(row | _floors(row, limits))
    batches = list(dict.fromkeys(row["batch"] for row in made))
    lengths = list(dict.fromkeys(row["length"] for row in made))
    return sorted(made, key=lambda r: (batches.index(r["batch"]), lengths.index(r["length"])))


def _figures(lines: Sequence[Row], plain: Sequence[Row]) -> Row:
    """Medians and ranges of a row's lines, and its ratios to those of plain transformers."""
    bad = [line for line in lines if line["outcome"] != OK]
    if bad:
        return {"outcome": bad[0]["outcome"], "reason": bad[0]["reason"]}
    row: Row = {"outcome": OK}
    timed = {line["round"]: line for line in lines if line["round"]}
    theirs = {line["round"]: line for line in plain if line["round"] and line["outcome"] == OK}
    for line in lines:
        row |= {k: line[k] for k in ("peak_bytes", "decode_peak_bytes") if k in line}
    if not timed:
        return row
    for name, short in _TIMES.items():
        values = [line[name] for line in timed.values()]
        row |= {name: median(values), f"{short}_range_s": [min(values), max(values)]}
        both = [line[name] / theirs[n][name] for n, line in timed.items() if n in theirs]
        row[f"{short}_ratio"] = median(both) if both else None
    last = list(timed.values())[-1]
    row |= {name: last[name] for name in _LAST} | {"rounds": len(timed)}
    for name in ("median_step_s", "capture_s"):
        row[name] = median(line[name] for line in timed.values())
    if row["full_bytes"] is None and theirs:  # a peer cannot tell
        row["full_bytes"] = next(iter(theirs.values()))["full_bytes"]
    return row


def _floors(row: Row, limits: Mapping[str, float]) -> Row:
    """Tokens per second, and the seconds below which machine and model let no row come."""
    if "token_s" not in row:
        return {}
    batch, length = row["batch"], row["length"]
    found: Row = {"ms_per_token": 1e3 * row["token_s"], "tokens_per_s": batch / row["token_s"]}
    found["ms_per_token_range"] = [1e3 * value for value in row["token_range_s"]]
    if not limits:
        return found
    pairs = length * (length + 1) / 2
    flop = length * limits["layers_flop_per_token"] + pairs * limits["attention_flop_per_pair"]
    work = batch * (flop + limits["head_flop_per_token"])
    moved = limits["weight_bytes"] + row["held_bytes"]
    found["full_prefill_floor_s"] = work / limits["matmul_flop_per_s"]
    found["token_floor_s"] = moved / limits["copy_bytes_per_s"]
    found["of_bandwidth"] = found["token_floor_s"] / row["token_s"]
    return found


def table(rows: Sequence[Row], short: bool = False) -> Cells:
    """The figures; those of a row that was not measured say why. `short` fits a terminal."""
    columns = [("tokens", "right"), ("batch", "right"), ("method", "left"), ("keep", "right")]
    shown = [(name, cell) for name, cell, always in _FIGURES if always or not short]
    batched = any(row["batch"] > 1 for row in rows)
    cells = []
    for row in rows:
        start = [f"{row['length']}"] + [f"{row['batch']}"] * batched
        start += [row["method"], row["keep"] or "all"]
        failed = [outcome(row)] + ["-"] * (len(shown) - 1)
        cells.append(start + ([cell(row) for _, cell in shown] if "token_s" in row else failed))
    columns = columns if batched else [columns[0], *columns[2:]]
    return Cells([*columns, *((name, "right") for name, _ in shown)], cells)


_FIGURES: list[tuple[str, Callable[[Row], str], bool]] = [  # heading, cell, also in a terminal
    ("first token", lambda row: seconds(row["ttft_s"]), True),
    ("to plain", lambda row: ratio(row["ttft_ratio"]), True),
    ("per token", lambda row: f"{row['ms_per_token']:.1f} ms", True),
    ("to plain", lambda row: ratio(row["token_ratio"]), True),
    ("tokens/s", lambda row: f"{row['tokens_per_s']:.1f}", True),
    ("end to end", lambda row: seconds(row["end_to_end_s"]), False),
    ("to plain", lambda row: ratio(row["end_to_end_ratio"]), False),
    ("peak", lambda row: size(row.get("peak_bytes")), True),
    ("decode peak", lambda row: size(row.get("decode_peak_bytes")), False),
    ("held", lambda row: size(row["held_bytes"]), True),
    ("of full", lambda row: _share(row["held_bytes"], row["full_bytes"]), True),
]


def outcome(row: Row) -> str:
    """Why a row has no seconds, in a word; a run that was cut off has rounds for memory alone."""
    return NOT_YET if row["outcome"] == OK else row["outcome"]


def _share(part: int, whole: int | None) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"


def reasons(rows: Sequence[Row]) -> list[str]:
    """A sentence for every row that was not measured; batches with one reason share it."""
    found: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        if row["outcome"] != OK:
            name = f"{row['method']} {row['keep']}".strip() + f", {row['length']} tokens"
            found.setdefault((name, row["outcome"], row["reason"]), []).append(f"{row['batch']}")
    return [
        f"{name} (batch {', '.join(batches)}): {outcome}: {reason}"
        for (name, outcome, reason), batches in found.items()
    ]


def title(record: Mapping[str, Any]) -> str:
    """What was measured where, in a line."""
    machine, plan = record["machine"], record["plan"]
    return (
        f"{record['model']['name']}, {record['model']['dtype']}, on {machine['device']}, "
        f"{machine['threads']} CPU thread{'s' * (machine['threads'] > 1)}, medians of "
        f"{plan['repeats']} round{'s' * (plan['repeats'] > 1)}, {plan['new_tokens']} decoding "
        "steps; peaks are above the loaded model"
    )


def page(record: Mapping[str, Any], rows: Sequence[Row], published: str = "") -> str:
    """`speed.md`: the table, its spread and floors, what failed, published figures."""
    parts = [f"# Speed\n\n{prose(title(record))}.\n", table(rows).markdown()]
    failed = reasons(rows)
    parts += ["Not measured:\n\n" + "".join(f"- {line}\n" for line in failed)] if failed else []
    parts += [_detail(record, rows), published]
    return "\n".join(part for part in parts if part)


FLOORS = (
    "Median (least to most) of the rounds. Floors: a full prefill's arithmetic, and reading "
    "weights and held bytes once, at the rates measured in the same run."
)


def spread_table(rows: Sequence[Row]) -> Cells:
    """Ranges over the rounds beside what the machine would allow."""
    headings = ("first token, s", "floor", "per token, ms", "floor")
    headings += ("of bandwidth", "steps", "entries")
    columns = [("tokens", "right"), ("batch", "right"), ("method", "left"), ("keep", "right")]
    columns += [(heading, "right") for heading in headings]
    return Cells(columns, [_details(row) for row in rows if "token_floor_s" in row])


def _detail(record: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The same with what the floors were measured to be."""
    limits = record["limits"]
    said = (
        "## Spread and floors\n\nMedian (least to most) of the rounds. Floors: a full prefill's "
        f"arithmetic at {limits['matmul_flop_per_s'] / 1e12:.3g} TFLOP/s, and weights "
        f"({size(limits['weight_bytes'])}) plus held bytes at "
        f"{limits['copy_bytes_per_s'] / 1e9:.3g} GB/s, both measured in this run. Entries are per "
        "KV head after the prompt, on average. Of bandwidth: the floor's share of the time per "
        "token. Captured steps are replayed CUDA graphs; making one is part of end to end.\n\n"
    )
    return said + spread_table(rows).markdown()


def _details(row: Row) -> list[str]:
    return [
        f"{row['length']}",
        f"{row['batch']}",
        row["method"],
        row["keep"] or "all",
        spread(row["ttft_s"], row["ttft_range_s"]),
        seconds(row["full_prefill_floor_s"]),
        spread(row["ms_per_token"], row["ms_per_token_range"]),
        seconds(row["token_floor_s"]),
        f"{100 * row['of_bandwidth']:.0f}%",
        "captured" if row["captured"] else "plain",
        f"{row['entries']:.0f}",
    ]
