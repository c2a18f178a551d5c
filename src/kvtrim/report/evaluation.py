"""The tables of an evaluation, in the shapes that papers print them in."""

from collections.abc import Callable, Sequence

from kvtrim.records import OK
from kvtrim.report import families, tables
from kvtrim.report.format import Cells, Column
from kvtrim.report.gaps import of
from kvtrim.report.lookup import FULL, Row, View
from kvtrim.report.published_scores import beside
from kvtrim.report.tables import (
    HEAD,
    Table,
    keep,
    mebibytes,
    nats,
    percent,
    section_table,
    share,
)

_SCORES = "Scores of 0 to 100, mean and 95 % bootstrap interval; held: measured, of the full cache"
_RIGHT = "right"


def all_tables(view: View) -> list[Table]:
    """Every table there is something to say in."""
    makers: Sequence[Callable[[View], Table | None]] = (
        overview,
        longbench,
        categories,
        ruler,
        lengths,
        depths,
        shots,
        others,
        change,
        fidelity,
        beside,
        refusals,
        runs,
    )
    return [table for make in makers if (table := make(view)) is not None and table.cells.rows]


def overview(view: View) -> Table:
    """One line per method and budget over everything."""
    columns: list[Column] = [*HEAD, ("held", _RIGHT), ("of full", _RIGHT), ("score", _RIGHT)]
    columns += [("change", _RIGHT), ("loss above full", _RIGHT), ("KL", _RIGHT), ("tasks", _RIGHT)]
    rows = []
    for row in view.rows:
        own, held = view.tasks_with_score(view.tasks, row), view.memory(view.tasks, row)
        rows.append(
            [
                row[0],
                keep(row),
                mebibytes(held and held[0]),
                share(held and held[1]),
                tables.score(view.mean(own, row)),
                percent(view.change(own, row)) if row != FULL else tables.MISSING,
                nats(view.rise(view.tasks, row)) if row != FULL else tables.MISSING,
                nats(view.mean(view.tasks, row, "kl")),
                f"{len(own)} of {len(view.tasks)}",
            ]
        )
    about = (
        "The plain mean over all tasks of this section, each counted once, with 95 % bootstrap "
        "intervals. Change: (P_c - P_full) / P_full on the same samples. Loss and KL: nats per "
        "token of the right answer, read after the same cache. Held: measured bytes after the "
        "prompt."
    )
    return section_table(view, "overview", "Overview", about, Cells(columns, rows))


def longbench(view: View) -> Table | None:
    """The sixteen tasks."""
    found = view.tasks_by_name(families.longbench)
    about = f"{_SCORES}. The average is over the tasks that were measured."
    known = families.LONGBENCH_TASKS
    made = tables.scores(view, "longbench", "LongBench", about, found, known)
    return made if found else None


def categories(view: View) -> Table | None:
    """LongBench's six categories: the mean of each one's tasks."""
    found = view.tasks_by_name(families.longbench)
    columns: list[Column] = [*HEAD, *((name, _RIGHT) for name in families.LONGBENCH)]
    columns += [("average of categories", _RIGHT)]
    rows = []
    for row in view.rows:
        groups = [
            view.tasks_with_score([found[task] for task in tasks if task in found], row)
            for tasks in families.LONGBENCH.values()
        ]
        if not any(groups):
            continue
        line = category_scores(view, row)
        average = tables.score(view.mean_of_groups(groups, row))
        count = sum(map(bool, groups))
        rows.append([row[0], keep(row), *line, f"{average} over {count} of {len(groups)}"])
    about = (
        "Means of each category's measured tasks (how many of how many where some are missing)."
    )
    title = "LongBench by category"
    made = section_table(view, "longbench-categories", title, about, Cells(columns, rows))
    return made if found else None


def category_scores(view: View, row: Row) -> list[str]:
    """The mean of each category's tasks, as cells."""
    found = view.tasks_by_name(families.longbench)
    return [
        _over(
            view,
            view.tasks_with_score([found[task] for task in tasks if task in found], row),
            row,
            len(tasks),
        )
        for tasks in families.LONGBENCH.values()
    ]


def _over(view: View, tasks: list[str], row: Row, wanted: int) -> str:
    """A category's mean, and how many tasks it is made of where that is not all."""
    text = tables.score(view.mean(tasks, row))
    return f"{text} n={len(tasks)}/{wanted}" if 0 < len(tasks) < wanted else text


def ruler(view: View) -> Table | None:
    """RULER's thirteen tasks."""
    found = view.tasks_by_name(families.ruler)
    about = f"{_SCORES}. The average is over the tasks that were measured."
    made = tables.scores(view, "ruler", "RULER", about, found, families.RULER_TASKS)
    return made if found else None


def lengths(view: View) -> Table | None:
    """Needles by the length of the haystack."""
    return _grid(view, "length", "niah", "Needle in a haystack, by length in tokens")


def depths(view: View) -> Table | None:
    """Needles by how deep they lie."""
    title = "Needle in a haystack, by depth in percent"
    return _grid(view, "depth", "niah-depth", title)


def _grid(view: View, name: str, short: str, title: str) -> Table | None:
    lines = [line for line in view.section.lines if line.task in view.grids]
    places = sorted({line.group[name] for line in lines})
    columns: list[Column] = [("task", "left"), *HEAD, ("held", _RIGHT)]
    columns += [*((f"{place:,}", _RIGHT) for place in places), ("all", _RIGHT)]
    rows = []
    for task in view.grids:
        for row in view.rows:
            own = [
                view.mean([task], row, where=lambda line, at=place: line.group[name] == at)
                for place in places
            ]
            held = view.memory([task], row)
            start = [task, row[0], keep(row), share(held and held[1])]
            if held is not None:
                cells = [*map(tables.score, own), tables.score(view.mean([task], row))]
                rows.append([*start, *cells])
    made = section_table(view, short, title, f"{_SCORES}.", Cells(columns, rows))
    return made if rows else None


def shots(view: View) -> Table | None:
    """GSM8K by the number of worked examples."""
    found = {f"{count} shots": task for count, task in view.shots.items()}
    about = f"{_SCORES}. Shots: worked examples in the prompt."
    made = tables.scores(view, "gsm8k", "GSM8K by shots", about, found, average=False)
    return made if found else None


def others(view: View) -> Table | None:
    """Every task that no other table shows."""
    found = {task: task for task in view.others}
    about = f"{_SCORES}. The metric of each is in the table of runs."
    made = tables.scores(view, "tasks", "Other tasks", about, found)
    return made if found else None


def change(view: View) -> Table | None:
    """The papers' relative change against the full cache, by benchmark."""
    groups = benchmarks(view)
    columns: list[Column] = [*HEAD, ("held", _RIGHT), *((name, _RIGHT) for name in groups)]
    rows = []
    for row in view.rows:
        held = view.memory(view.tasks, row)
        if row == FULL or held is None:
            continue
        own = [percent(view.change(tasks, row)) for tasks in groups.values()]
        rows.append([row[0], keep(row), share(held[1]), *own])
    about = (
        "(P_c - P_full) / P_full on the samples that both have, with 95 % bootstrap intervals of "
        "the pairs; 0 % is the full cache, no figure where the full cache scores nothing."
    )
    title = "Performance change against the full cache"
    return section_table(view, "change", title, about, Cells(columns, rows))


def benchmarks(view: View) -> dict[str, list[str]]:
    """Tasks by the benchmark whose average papers print; every other task by itself."""
    groups = {
        "LongBench": list(view.tasks_by_name(families.longbench).values()),
        "RULER": list(view.tasks_by_name(families.ruler).values()),
        **{task: [task] for task in view.grids},
        "GSM8K": list(view.shots.values()),
        **{task: [task] for task in view.others},
    }
    return {name: own for name, own in groups.items() if own}


def fidelity(view: View) -> Table | None:
    """What the answers' likelihood loses, against what is held."""
    columns: list[Column] = [*HEAD, ("held", _RIGHT), ("of full", _RIGHT), ("entries", _RIGHT)]
    columns += [("loss", _RIGHT), ("loss above full", _RIGHT), ("KL to full", _RIGHT)]
    rows = []
    for row in view.rows:
        held, loss = view.memory(view.tasks, row), view.mean(view.tasks, row, "loss")
        if held is None or loss is None:
            continue
        entries = view.mean(view.tasks, row, "entries")
        line = [row[0], keep(row), mebibytes(held[0]), share(held[1])]
        line += [f"{entries.value:,.0f}" if entries else tables.MISSING, nats(loss)]
        line += [nats(view.rise(view.tasks, row)), nats(view.mean(view.tasks, row, "kl"))]
        rows.append(line)
    about = (
        "Nats per token of the right answer, fed after the same cache (teacher forcing), means "
        "over tasks with 95 % bootstrap intervals. Under question-aware the answer's first token "
        "comes from the prompt's own pass and does not count. Entries: per KV head, after the "
        "prompt."
    )
    title = "Loss and KL against what is held"
    return section_table(view, "fidelity", title, about, Cells(columns, rows))


def refusals(view: View) -> Table | None:
    """What could not be measured, and why."""
    met: dict[tuple[str, ...], int] = {}
    for line in view.section.lines:
        if line.outcome != OK or (line.score is None and line.reason):
            key = (line.task, line.method, keep((line.method, line.keep)), line.outcome)
            met[*key, line.reason] = met.get((*key, line.reason), 0) + 1
    rows = [[*key[:4], f"{count}", key[4]] for key, count in met.items()]
    columns: list[Column] = [("task", "left"), *HEAD, ("outcome", "left"), ("samples", _RIGHT)]
    columns += [("reason", "left")]
    about = "These samples count nowhere; a method that refuses some is compared on the others."
    return section_table(view, "not-measured", "Not measured", about, Cells(columns, rows))


def runs(view: View) -> Table:
    """The tasks: how many samples, which metric, whose data."""
    columns: list[Column] = [("task", "left"), ("version", _RIGHT), ("metric", "left")]
    columns += [("samples", _RIGHT), ("data", "left")]
    rows = []
    for task in view.tasks:
        known = view.section.about(task)
        samples = {line.sample for line in view.section.lines if line.task == task}
        files = [
            f"{data.get('file', name)} ({data['rows']} rows, sha256 {data['sha256'][:12]})"
            for name, data in (known.get("data") or {}).items()
        ]
        start = [task, str(known.get("version", tables.MISSING)), known.get("metric", "")]
        rows.append([*start, f"{len(samples)}", "; ".join(files) or "made from the seed"])
    places = dict.fromkeys(_place(run.record) for run in view.section.runs)
    missing = [f"{note}." for run in view.section.runs for note in of(run, run.folder.name)]
    about = " ".join(["What was asked.", *places, *missing])
    return section_table(view, "runs", "Runs", about, Cells(columns, rows))


def _place(record: object) -> str:
    """Where and how a run was made, in a sentence."""
    assert isinstance(record, dict)
    machine, model = record.get("machine") or {}, record["model"]
    parts = [
        f"kvtrim {machine.get('kvtrim', '?')}",
        f"commit {(machine.get('commit') or '?')[:12]}",
    ]
    packages = machine.get("packages") or {}
    parts += [f"{name} {packages[name]}" for name in ("torch", "transformers") if name in packages]
    parts += [str(machine.get("device", "?")), str(model.get("dtype", "?"))]
    parts += [f"seed {record.get('seed')}", f"limit {record.get('limit')}"]
    if record.get("max_new_tokens"):
        parts += [f"answers of at most {record['max_new_tokens']} tokens"]
    return f"Measured with {', '.join(parts)}."
