"""`speed`: seconds and bytes beside plain transformers, measured in this run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kvtrim.cli import options, output
from kvtrim.errors import UsageError

Lengths = Annotated[
    list[int] | None, typer.Option("--length", min=1, help="Prompt length; repeat for several.")
]
Repeats = Annotated[int, typer.Option(min=1, help="Counted rounds; a warm-up comes before.")]
Steps = Annotated[
    int, typer.Option("--new-tokens", min=1, help="Decoding steps after each prompt.")
]
OutFile = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Also append the records to this file, one a line."),
]


def speed(
    length: Lengths = None,
    method: options.Methods = None,
    keep: options.Keeps = None,
    set_: options.Set = None,
    new_tokens: Steps = 32,
    repeats: Repeats = 3,
    out: OutFile = None,
    model: options.Model = "smollm2",
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Measure prefill, decoding and memory; plain transformers is always measured beside."""
    from kvtrim.bench import speed as bench

    lengths, settings = length or [512, 2048], options.parse_settings(set_)
    chosen = bench.candidates(method or ["full", "snapkv", "adakv"], keep or ["512"], settings)
    if out is not None and not out.parent.is_dir():
        raise UsageError(f"cannot write {out}: there is no folder {out.parent}")
    loaded, _ = options.load(model, device, dtype, threads)
    total = len(lengths) * len(chosen) * (repeats + 1) + 1
    with output.progress() as report:
        done = -1

        def tell(what: str) -> None:
            nonlocal done
            done += 1
            report(what, done, total)

        timings = bench.measure(loaded, lengths, chosen, new_tokens, repeats, tell)
    from kvtrim.bench.machine import provenance

    record = {"model": model, "new_tokens": new_tokens, "repeats": repeats}
    record |= {"machine": provenance(loaded.device), "rows": [t.record() for t in timings]}
    if out is not None:
        import json as library

        with out.open("a", encoding="utf-8") as file:
            file.write(library.dumps(record) + "\n")
    if not json:
        _print(record)
    output.print_json(record)


def _print(record: dict[str, Any]) -> None:
    columns = [("tokens", "right"), ("method", "left"), ("keep", "right")]
    names = (
        "first token",
        "to plain",
        "per token",
        "to plain",
        "tokens/s",
        "peak",
        "held",
        "of full",
    )
    columns += [(name, "right") for name in names]
    rows = [
        [
            str(row["length"]),
            row["method"],
            row["keep"] or "all",
            output.seconds(row["ttft_s"]),
            f"x{row['ttft_ratio']:.2f}",
            f"{row['ms_per_token']:.1f} ms",
            f"x{row['token_ratio']:.2f}",
            f"{row['tokens_per_s']:.1f}",
            output.size(row["peak_bytes"]),
            output.size(row["held_bytes"]),
            f"{100 * row['held_bytes'] / row['full_bytes']:.1f}%",
        ]
        for row in record["rows"]
    ]
    machine = record["machine"]
    output.table(
        f"{record['model']} on {machine['device']}, {machine['threads']} threads, medians of "
        f"{record['repeats']} rounds; peak is the prefill's, above the loaded model",
        columns,
        rows,
    )
