"""docs/papers.md: every table and figure of the papers, its command, and whether it was tried."""

from kvtrim.papers.recipe import Recipe, recipes
from kvtrim.report.format import Cells

_HEAD = """# Papers

<!-- Written by `make docs` from kvtrim's recipes: edits here are lost. -->

Every table and figure of five papers: FastKV (arXiv 2502.01068), CircuitKV (a results file),
CurDKV (arXiv 2509.15038), KVFundaBench with ShotKV (arXiv 2502.01941) and LaProx (arXiv
2605.07234). Figures that are not numbered in all versions of a paper are named by what they show.

```
kvtrim papers                               # this list
kvtrim papers run curdkv/table-2 --out DIR  # the paper's models, methods, prompts and budgets
kvtrim papers run curdkv/table-2 --out DIR --model M --data DATA --limit 20 --keep 10%
kvtrim papers run curdkv/table-2 --out DIR --model M --data DATA --task longbench-qasper
kvtrim papers show curdkv/table-2 DIR       # in the paper's shape, and what differs from it
kvtrim papers show curdkv/table-2           # what the paper prints
```

A run is a [sweep](evaluation.md): cut off, it goes on when asked for again; `--workers` and
`--ray` spread it; several models have a folder each. `kvtrim report DIR` makes pages and plots.

A published figure stands below ours only where all that decides it is the paper's: model,
protocol, chat template, where long prompts are cut, lengths of answers, examples, budget, and the
method with its parameters (window, sinks, pooling, order of groups, heads that hold entries, what
is evicted while an answer is written). Otherwise the differences are listed and nothing published
is shown. Prompts that `--length` or the window cut shorter than the paper does are counted in the
cell; a task of which more than a tenth were cut stands alone. Papers do not name the hardware of
their times: FastKV's stand below ours as ratios to the full cache, on its models (or `--config` of
their dimensions) and a GPU alone.

`--length` counts the answer that a task allows, also where `--max-new-tokens` allows a shorter
one: prompts stay the same, and the loss is that of the whole right answer.
Budgets count window and sinks in; presets of codes that hold query heads hold them here
too, and their bytes are measured. Hours are a guess for one model of 8B parameters on one large
GPU. Tried says what ran and drew on SmolLM2-135M, on a CPU, with small limits: that the command
works, not what the paper found.
"""


def manual() -> str:
    """The whole file."""
    parts = [_HEAD]
    for paper in dict.fromkeys(one.paper for one in recipes()):
        own = [one for one in recipes() if one.paper == paper]
        about = f"{own[0].title}{f' (arXiv {own[0].arxiv})' if own[0].arxiv else ''}"
        parts += [f"\n## {about}\n\n", *_methods(own)]
        columns = ("what", "shows", "command", "needs", "hours", "tried, or why not")
        parts += [Cells.texts(columns, map(_row, own)).markup()]
    return "".join(parts)


def _methods(own: list[Recipe]) -> list[str]:
    """What the paper's methods are here, and in what they cannot be the paper's."""
    known = {name: text for one in own for name, text in one.methods.items()}
    notes = {name: text for one in own for name, text in one.notes.items()}
    rows = [(name, f"`{text}`", notes.get(name, "")) for name, text in known.items()]
    said = f"Protocol: {own[0].protocol}"
    cut = dict.fromkeys(map(str, own[0].truncate_at.values()))
    said += f"; prompts cut at {' or '.join(cut)} tokens as LongBench cuts them" if cut else ""
    said += "; no chat template" if any(one.chat is False for one in own) else ""
    return [f"{said}.\n\n", Cells.texts(("method", "here", "but"), rows).markup(), "\n"]


def _row(one: Recipe) -> tuple[str, ...]:
    hours = f"{one.hours:.1f}" if one.kind in ("eval", "speed") else ""
    command = f"`{one.command}`" if one.command else ""
    return one.id, one.about, command, one.needs, hours, one.reason or one.tried
