"""A paper's seconds and bytes drawn from our runs, in its shape, and what differs from the paper.

Papers name no hardware for their times. So a published time stands below ours as a ratio to the
full cache of the same model and length, and only below a run of the paper's model on a GPU.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from kvtrim.papers.recipe import Recipe, paper_model, short_model
from kvtrim.records import OK
from kvtrim.report import speed
from kvtrim.report.format import Cells, Column, ratio
from kvtrim.report.lookup import rounded_budget, size_of
from kvtrim.report.results import SpeedRun
from kvtrim.report.tables import MISSING, Table

_HEAD: list[Column] = [("keep", "right"), ("method", "left")]
_WHOSE: Column = ("whose", "left")
_GPUS = ("cuda", "mps", "xpu")  # types of devices
_RATES = "throughput"
_FULL = "full"
_Cells = Mapping[tuple[str, str, int | None], str]  # budget, method, length

Drawing = tuple[Table, list[str]]


def draw(recipe: Recipe, run: SpeedRun) -> list[Drawing]:
    """The paper's table where it has one, then everything measured; each with what differs."""
    rows = speed.rows(run.lines, run.record["limits"])
    name = f"{recipe.name}, {run.record['model']['name']}"
    whole = Table(
        recipe.name, f"{name}: seconds and bytes", speed.title(run.record), speed.table(rows)
    )
    told = _differences(recipe, run.record, rows)
    if not recipe.tables:
        if _model(recipe, run.record["model"]) is not None:
            told += _facts_beside(recipe, rows)
        return [(whole, told)]
    unlike = _unlike(recipe, run.record)
    shaped = _in_shape(recipe, run.record, rows, [] if unlike else recipe.tables)
    return [(shaped, [*told, *unlike]), (whole, [])]


def tables_in_print(recipe: Recipe) -> list[Table]:
    """What the paper prints or its text says, a table for each of its models."""
    made = [_facts_in_print(recipe)] if recipe.facts else []
    for table in recipe.tables:
        if "benchmark" not in table or table["benchmark"] not in ("ttft", _RATES):
            continue
        cells = {
            (_keep_of(row), row["method"], row["context"]): _figure(
                table["benchmark"], row["value"]
            )
            for row in table["rows"]
        }
        lengths = list(dict.fromkeys(row["context"] for row in table["rows"]))
        columns = [*_HEAD, *((_name_length(length), "right") for length in lengths)]
        rows = dict.fromkeys((keep, method) for keep, method, _ in cells)
        lines = [
            [
                "all" if method == _FULL else keep or MISSING,
                method,
                *(cells.get((keep, method, n), MISSING) for n in lengths),
            ]
            for keep, method in rows
        ]
        name = f"{recipe.name}/{short_model(table['model'])}"
        title = f"{recipe.name}, {table['model']}: {recipe.about}"
        made.append(Table(name, title, table["note"], Cells(columns, lines)))
    return made


def _in_shape(
    recipe: Recipe,
    record: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    beside: Sequence[Mapping[str, Any]],
) -> Table:
    """Rows of a budget and method, a column for each length; the paper's ratios below ours."""
    what = recipe.tables[0]["benchmark"]
    lengths = sorted({row["length"] for row in rows})
    names = {label: name for name, label in recipe.methods.items()}
    order = {name: place for place, name in enumerate(recipe.methods)}
    ours: dict[tuple[str, str, int | None], str] = {}
    for row in rows:
        if row["batch"] == 1:
            name: str = names.get(row["method"]) or row["method"]
            ours[row["keep"], name, row["length"]] = _ours(what, row)
    model = _model(recipe, record["model"])
    theirs = _ratios([one for one in beside if one["model"] == model])
    met = sorted(
        dict.fromkeys((keep, method) for keep, method, _ in ours),
        key=lambda one: (one[0] != "", size_of(one[0]), order.get(one[1], -1)),
    )
    lines: list[list[str]] = []
    for keep, method in met:
        own = [ours.get((keep, method, length), MISSING) for length in lengths]
        lines.append([keep or "all", method, "ours", *own])
        other = [_beside(theirs, recipe.keeps, keep, method, length) for length in lengths]
        if any(other):
            lines.append([keep or "all", method, "published", *(one or MISSING for one in other)])
    columns = [*_HEAD, _WHOSE, *((_name_length(length), "right") for length in lengths)]
    measured = "seconds to the first token" if what == "ttft" else "tokens per second"
    about = f"{recipe.title}: {measured}, and the ratio to the full cache (ours: to transformers)."
    title = f"{recipe.name}, {record['model']['name']}: {recipe.about}"
    return Table(f"{recipe.name}/shape", title, about, Cells(columns, lines))


def _beside(theirs: _Cells, keeps: Sequence[str], keep: str, method: str, length: int) -> str:
    """A published ratio at a length; a table that names no budget has those of its recipe."""
    found = theirs.get((keep, method, length), "")
    return found or (theirs.get(("", method, length), "") if keep in keeps else "")


def _ratios(tables: Sequence[Mapping[str, Any]]) -> _Cells:
    """Ratios to the full cache of the same table and length."""
    found: dict[tuple[str, str, int | None], str] = {}
    for table in tables:
        full = {row["context"]: row["value"] for row in table["rows"] if row["method"] == _FULL}
        for row in table["rows"]:
            if row["context"] in full and row["method"] != _FULL:
                value = ratio(row["value"] / full[row["context"]])
                found[_keep_of(row), row["method"], row["context"]] = value
    return found


def _keep_of(row: Mapping[str, Any]) -> str:
    return "" if row["keep"] is None else f"{row['keep']}"


def _name_length(length: int | None) -> str:
    return "length not given" if length is None else f"{length} tokens"


def _ours(what: str, row: Mapping[str, Any]) -> str:
    if "token_s" not in row:
        return speed.outcome(dict(row))
    if what == "ttft":
        return f"{_figure(what, row['ttft_s'])}, {ratio(row['ttft_ratio'])}"
    relative = row["token_ratio"]
    return f"{_figure(what, row['tokens_per_s'])}, {ratio(relative and 1 / relative)}"


def _figure(what: str, value: float) -> str:
    return f"{value:.2f} s" if what == "ttft" else f"{value:.2f} /s"


def _model(recipe: Recipe, model: Mapping[str, Any]) -> str | None:
    """Which of the paper's models a run's is, by name or by a configuration of its dimensions."""
    name, config = str(model["name"]), model.get("config")
    if config is None:
        found = paper_model(recipe, name)
        return found if found in recipe.models else None
    if name != f"{config} (random weights)":  # layers or heads were left out
        return None
    return next((own for own in recipe.models if short_model(own) == f"{config}-instruct"), None)


def _differences(
    recipe: Recipe, record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> list[str]:
    """In what the run is not the paper's."""
    told, model = [], record["model"]
    if _model(recipe, model) is None:
        told.append(f"the model: {model['name']} here, {', '.join(recipe.models)} there")
    elif model.get("config") is not None:
        told.append("the weights: random ones here, of the model's dimensions")
    met = sorted({row["length"] for row in rows})
    if met != sorted(recipe.lengths):
        here, there = (", ".join(map(str, found)) for found in (met, recipe.lengths))
        told.append(f"lengths: {here} here, {there} there")
    steps = record["plan"].get("new_tokens")
    if steps != recipe.new_tokens:
        told.append(f"decoding steps: {steps} here, {recipe.new_tokens} in the recipe")
    labels = {row["method"] for row in rows} - {speed.PLAIN, _FULL}
    wanted = {name: text for name, text in recipe.methods.items() if name != _FULL}
    told += [f"not measured: {name}" for name, text in wanted.items() if text not in labels]
    told += [f"not the paper's: {text}" for text in sorted(labels - {*wanted.values()})]
    kept = {row["keep"] for row in rows if row["keep"]}
    if wanted:
        told += [f"not measured: keep {text}" for text in recipe.keeps if text not in kept]
    told += [f"{name}: {text}" for name, text in recipe.notes.items()]
    told += speed.reasons([dict(row) for row in rows])
    late = sum(row["outcome"] == OK and "token_s" not in row for row in rows)
    if late:
        told.append(f"cut off: {late} of {len(rows)} rows are not timed yet; run it again")
    machine = record["machine"]["device"]
    told.append(
        f"the device: {machine} here, not named there: seconds do not compare, look at ratios to "
        "the full cache"
    )
    return told


def _unlike(recipe: Recipe, record: Mapping[str, Any]) -> list[str]:
    """Why no published time stands below ours; nothing if it may."""
    found = []
    if _model(recipe, record["model"]) is None:
        found.append("another model")
    if not _on_gpu(record["machine"]):
        found.append("no GPU by its record, and the paper's times are a GPU's")
    if (
        recipe.tables[0]["benchmark"] == _RATES
        and record["plan"].get("new_tokens") != recipe.new_tokens
    ):
        found.append("another number of decoding steps")
    if found:
        return [f"nothing published stands beside: {'; '.join(found)}"]
    printed = [row for table in recipe.tables for row in table["rows"]]
    if all(row["context"] is None for row in printed):
        return ["nothing published stands beside: the paper's table names no length of prompts"]
    if all(row["method"] == _FULL for row in printed):
        return ["nothing published stands beside: ratios are to the full cache, all that is in it"]
    return []


def _on_gpu(machine: Mapping[str, Any]) -> bool:
    """By the device's type; a record without one is of a GPU if its name says NVIDIA's."""
    kind = machine.get("device_type")
    return machine["device"].startswith("NVIDIA") if kind is None else kind in _GPUS


def _facts_beside(recipe: Recipe, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the paper's text says of a time or size where this run has the same length and budget.

    As ratios to the full cache: the paper's own there, plain transformers here.
    """
    own = {
        (row["method"], row["length"], rounded_budget(row["keep"])): row
        for row in rows
        if row["batch"] == 1 and row["outcome"] == OK
    }
    found = []
    for fact in recipe.facts:
        label = recipe.methods[fact["method"]]
        row = own.get((label, fact["context"], ("share", fact["kept"])))
        ours = None if row is None else _relative(row, fact["what"])
        if ours is not None:
            found.append(f"published: {_say_fact(fact)}; here {ratio(ours)}")
    return found


def _relative(row: Mapping[str, Any], what: str) -> float | None:
    if what == "held":
        return row["held_bytes"] / row["full_bytes"] if row.get("full_bytes") else None
    return row.get({"first token": "ttft_ratio", "per token": "token_ratio"}[what])


def _say_fact(fact: Mapping[str, Any]) -> str:
    value, full, unit = fact["value"], fact["full"], fact["unit"]
    there = f"{fact['qualifier']} {value} of {full} {unit}, {ratio(value / full)}"
    return f"{fact['what']}, {fact['context']:,} tokens, {fact['kept']:.0%} kept: {there}"


def _facts_in_print(recipe: Recipe) -> Table:
    """What the paper's text says of a figure that has no numbers."""
    columns: list[Column] = [("tokens", "right"), ("keep", "right"), ("what", "left")]
    columns += [("published", "right"), ("full cache", "right"), ("ratio", "right")]
    columns += [("where", "left"), ("but", "left")]
    rows = [
        [
            f"{fact['context']}",
            f"{fact['kept']:.0%}",
            fact["what"],
            f"{fact['qualifier']} {fact['value']} {fact['unit']}",
            f"{fact['full']} {fact['unit']}",
            ratio(fact["value"] / fact["full"]),
            fact["where"],
            fact.get("note", ""),
        ]
        for fact in recipe.facts
    ]
    about = f"What the text of {recipe.title} says of it; hardware is not named."
    return Table(recipe.name, f"{recipe.name}: {recipe.about}", about, Cells(columns, rows))
