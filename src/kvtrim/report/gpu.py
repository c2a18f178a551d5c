"""The lines of a run on a GPU as one page: tables by stage, targets reached, what is missing."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from kvtrim.records import ENDED, FAILED, OK, SKIPPED
from kvtrim.report.format import Cells, Column, ratio, seconds, size

Line = dict[str, Any]
_FAILED = (FAILED, ENDED)

TTFT = {32_768: 1.88, 65_536: 1.94, 131_072: 1.97}
"""FastKV's published ratios of time to first token, full to fastkv (arXiv 2502.01068)."""


def figures(lines: Sequence[Line], stage: str | None = None) -> list[Line]:
    """What was measured, one record each."""
    found = [x for x in lines if x["outcome"] == OK and stage in (None, x["stage"])]
    return [x["figures"] | {"name": x["name"]} for x in found]


def failures(lines: Sequence[Line]) -> list[Line]:
    """Measurements whose last word is a failure."""
    last = {(x["stage"], x["name"]): x for x in lines}
    return [x for x in last.values() if x["outcome"] in _FAILED]


def page(lines: Sequence[Line]) -> str:
    """Everything as Markdown."""
    parts = ["# Measured on a GPU", *_places(lines)]
    for title, table in _TABLES.items():
        cells = table(lines)
        if cells.rows:
            parts += [f"## {title}", cells.markdown()]
    reached = targets(lines)
    if reached:
        columns = _columns(["target", "asked for", "measured", ""], left=(0, 3))
        parts += ["## Targets", Cells(columns, reached).markdown()]
    missing = [f"- {x['stage']}: {x['name']}: {x['reason']}" for x in failures(lines)]
    skipped = [
        f"- {x['stage']}: {x['name']}: {x['reason']}" for x in lines if x["outcome"] == SKIPPED
    ]
    if missing:
        parts += ["## Failed", "\n".join(missing)]
    if skipped:
        parts += ["## Not tried", "\n".join(dict.fromkeys(skipped))]
    return "\n\n".join(parts) + "\n"


def _places(lines: Sequence[Line]) -> list[str]:
    """Machine, versions and commit of the lines."""
    said = []
    for line in lines:
        own = line["machine"]
        packages = own.get("packages", {})
        versions = ", ".join(f"{name} {packages[name]}" for name in _SHOWN if name in packages)
        commit = str(own.get("commit") or "unknown")[:12]
        python = f"Python {own.get('python')}"
        said.append(f"{own.get('device')}; {python}, {versions}; commit {commit}")
    return [" / ".join(dict.fromkeys(said))] if said else []


_SHOWN = ("torch", "transformers", "triton", "numpy")


def _check(lines: Sequence[Line]) -> Cells:
    rows = [
        [x["name"], impl, f"{far:.1e}", f"{x['most']:.0e}"]
        for x in figures(lines, "check")
        for impl, far in x["apart"].items()
    ]
    return Cells(_columns(["shape", "kernel", "from float64", "at most"], left=(0, 1)), rows)


def _tokens(lines: Sequence[Line]) -> Cells:
    rows = [[x["name"], f"{x['tokens']}", x["decoding"]] for x in figures(lines, "tokens")]
    return Cells(_columns(["method", "equal tokens", "decoding"], left=(0, 2)), rows)


def _decode(lines: Sequence[Line]) -> Cells:
    rows = [
        [
            f"{x['rows']}", f"{x['held']}", x["subject"], f"{1e3 * x['median_step_s']:.2f}",
            f"{x['rows'] / x['median_step_s']:.0f}", size(x["held_bytes"]),
            f"{100 * x['of_bandwidth']:.0f} %", f"{x['capture_s']:.2f}",
        ]
        for x in figures(lines, "decode")
    ]  # fmt: skip
    names = ["batch", "held per head", "", "ms per token", "tokens/s", "held", "of copy bandwidth"]
    return Cells(_columns([*names, "capture s"], left=(2,)), rows)


def _serve(lines: Sequence[Line]) -> Cells:
    rows = [
        [
            f"{x['answers']}", "captured" if x["captured"] else "plain",
            f"{1e3 * x['median_step_s']:.2f}", f"{x['answers'] / x['median_step_s']:.0f}",
            seconds(x["first_s"]), size(x["held_bytes"]), f"{x['same']} of {x['answers']}",
        ]
        for x in figures(lines, "serve")
    ]  # fmt: skip
    names = ["answers", "step", "ms per step", "tokens/s", "slowest of the first four"]
    return Cells(_columns([*names, "documents held", "last token as alone"], left=(1,)), rows)


def _prefill(lines: Sequence[Line], stage: str = "prefill") -> Cells:
    found, rows = figures(lines, stage), []
    for length, method in dict.fromkeys((x["length"], x["method"]) for x in found):
        own = [x for x in found if (x["length"], x["method"]) == (length, method)]
        first = median(x["ttft_s"] for x in own)
        cells = [f"{length}", method, own[0]["keep"], seconds(first), f"{len(own)}"]
        for other in ("transformers", "full"):
            beside = _first(found, length, other)
            cells.append("-" if beside is None else ratio(first / beside))
        peaks = [x["peak_bytes"] for x in own if x["peak_bytes"] is not None]
        rows.append([*cells, size(max(peaks)) if peaks else "-", size(own[0]["held_bytes"])])
    names = ["tokens", "method", "keep", "first token", "rounds", "to plain", "to full", "peak"]
    return Cells(_columns([*names, "held"], left=(1,)), rows)


def _first(found: Sequence[Line], length: int, method: str) -> float | None:
    """Median time to first token of a method at a length."""
    own = [x["ttft_s"] for x in found if (x["length"], x["method"]) == (length, method)]
    return median(own) if own else None


def _probe(lines: Sequence[Line]) -> Cells:
    return _prefill(lines, "probe")


def _kernels(lines: Sequence[Line]) -> Cells:
    rows = [
        [
            f"{x['rows']}", f"{x['held']}", "0.2 to 1.8" if x["per_head"] else "alike", x["impl"],
            f"{x['us']:.1f}", f"{100 * x['of_bandwidth']:.0f} %",
        ]
        for x in figures(lines, "kernels")
    ]  # fmt: skip
    names = ["batch", "held per head", "heads", "kernel", "us per layer", "of copy bandwidth"]
    return Cells(_columns(names, left=(2, 3)), rows)


def _batch(lines: Sequence[Line]) -> Cells:
    rows = [
        [
            x["name"], f"{x['tokens']}", f"{x['batch']}", f"{x['tokens_per_s']:.0f}",
            size(x["used_bytes"]), size(x["memory"]),
        ]
        for x in figures(lines, "batch")
    ]  # fmt: skip
    names = ["method", "prompt", "largest batch", "tokens/s", "used", "allowed"]
    return Cells(_columns(names, left=(0,)), rows)


def _columns(names: Sequence[str], left: tuple[int, ...]) -> list[Column]:
    return [(name, "left" if at in left else "right") for at, name in enumerate(names)]


_TABLES: dict[str, Callable[[Sequence[Line]], Cells]] = {
    "Kernels against float64": _check,
    "Captured and plain decoding": _tokens,
    "Decoding": _decode,
    "Answers over four documents": _serve,
    "Prefill": _prefill,
    "Methods that read every query": _probe,
    "Decode attention alone": _kernels,
    "The largest batch": _batch,
}


def targets(lines: Sequence[Line]) -> list[list[str]]:
    """What docs/speed.md asks of one H100 or H200, as far as it was measured."""
    steps = {(x["rows"], x["held"], x["subject"]): x for x in figures(lines, "decode")}
    rows = []
    for batch, held in ((1, 1024), (32, 2048)):
        alike = steps.get((batch, held, "captured"))
        ragged = steps.get((batch, held, "captured per-head"))
        where = f"{held} held, batch {batch}"
        if alike:
            share = alike["of_bandwidth"]
            rows.append(_row(f"share of copy bandwidth, {where}", 0.85, share, least=True))
        if alike and ragged:
            slower = ragged["median_step_s"] / alike["median_step_s"]
            rows.append(_row(f"per-head to alike, {where}", 1.05, slower, least=False))
    found = figures(lines, "prefill")
    for length, asked in TTFT.items():
        full, fast = _first(found, length, "full"), _first(found, length, "fastkv")
        if full and fast:
            rows.append(_row(f"first token, full / fastkv, {length}", asked, full / fast, True))
    full, snap = _first(found, 32_768, "full"), _first(found, 32_768, "snapkv")
    if full and snap:
        rows.append(_row("first token, snapkv / full, 32768", 1.02, snap / full, least=False))
    return rows


def _row(name: str, asked: float, found: float, least: bool) -> list[str]:
    reached = found >= asked if least else found <= asked
    sign = "at least" if least else "at most"
    return [name, f"{sign} {asked:.2f}", f"{found:.3f}", "reached" if reached else "missed"]
