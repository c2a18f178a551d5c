"""Recipes of papers' tables and figures: which runs, with which methods, prompts and budgets.

A TOML file for each paper in `recipes/`. What all of a paper's items share stands at its top, an
item says what it has of its own. Kinds of items: `eval` (a sweep), `speed`, `analyze` (an analysis
of `kvtrim analyze`), and `reason` (why there is nothing to run).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from kvtrim import files
from kvtrim.errors import UnknownNameError, UsageError
from kvtrim.methods.variant import Variant
from kvtrim.records.spec import BATCH, SHARED, EvalSpec

FOLDER = Path(__file__).parent
"""Where the data lie."""
FULL = "full"
Kind = Literal["eval", "speed", "analyze", "reason"]
Table = Mapping[str, Any]  # of a file of published figures

_UNTRIED = {
    "eval": "not yet",
    "speed": "not yet",
    "analyze": "see `kvtrim analyze`",
    "reason": "",
}
_OF_ALL = "default"  # among settings by model
_SIZES = {  # of a task's benchmark: samples, tokens of a prompt, tokens of an answer
    "longbench": (200, 9_000, 140),
    "ruler": (500, 16_000, 64),
    "niah": (10, 64_000, 50),
    "gsm8k": (1_319, 1_500, 200),
    "mmlu": (14_042, 700, 8),
    "csqa": (1_221, 300, 8),
    "humaneval": (156, 2_000, 300),
    "jailbreakv": (20_000, 1_000, 200),
    "longgenbench": (20, 8_000, 4_000),
}
_TOKENS_PER_S = 12_000  # that an 8B model reads on one large GPU
_ANSWER_TOKENS_PER_S = 400  # that it writes there, batches of answers together
_SPEED_H = 0.2  # of a method at a length, rounds included


@dataclass(frozen=True)
class Recipe:
    """One table or figure of a paper."""

    paper: str  # curdkv
    id: str  # table-2
    about: str
    kind: Kind
    title: str  # of the paper, short
    arxiv: str
    models: Mapping[str, str]  # the paper's name: the Hub's
    methods: Mapping[str, str]  # the paper's name: ours, with parameters
    notes: Mapping[str, str]  # in what a method cannot be the paper's
    tasks: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    protocol: str = ""
    lengths: tuple[int, ...] = ()
    samples: int | None = None  # of each task; None: all
    chat: bool | None = None
    max_new_tokens: int | None = None
    truncate_at: Mapping[str, int] = field(default_factory=dict)  # by the paper's name of a model
    new_tokens: int = 32  # of a speed run
    analyze: str = ""  # name of an analysis
    reason: str = ""
    tried: str = ""  # what ran and drew on the embedded model
    tables: tuple[Table, ...] = ()  # published, as the files have them
    facts: tuple[Table, ...] = ()  # what its text says of a figure that has no numbers

    @property
    def name(self) -> str:
        """How it is asked for: curdkv/table-2."""
        return f"{self.paper}/{self.id}"

    @property
    def command(self) -> str:
        """What runs it; "" where there is nothing to run."""
        if self.kind == "reason":
            return ""
        return (
            f"kvtrim analyze {self.analyze}" if self.analyze else f"kvtrim papers run {self.name}"
        )

    @property
    def hours(self) -> float:
        """A rough guess for one of its models of 8B parameters on one large GPU."""
        cells = 1 + (len(self.methods) - (FULL in self.methods)) * len(self.keeps)
        if self.kind == "speed":
            return _SPEED_H * cells * len(self.lengths)
        seconds = 0.0
        for task in self.tasks:
            samples, prompt, answer = _size(task)
            samples = min(samples, self.samples or samples) * max(1, len(self.lengths))
            seconds += samples * prompt / _TOKENS_PER_S
            seconds += samples * cells * answer / _ANSWER_TOKENS_PER_S
        return seconds / 3600

    @property
    def needs(self) -> str:
        """Which data and what else it takes, in words."""
        if self.kind == "eval":
            own = f"rows of {', '.join(dict.fromkeys(map(_family, self.tasks)))}"
            long = f"; prompts of {max(self.lengths):,} tokens" if self.lengths else ""
            return own + long
        if self.kind == "speed":
            return f"prompts of up to {max(self.lengths):,} tokens; --config needs no weights"
        return "a text or a task" if self.kind == "analyze" else "nothing"

    def truncation(self, model: str) -> int | None:
        """The window at which the paper cuts a model's prompts; the usual one of other models."""
        return self.truncate_at.get(model, self.truncate_at.get(_OF_ALL))

    def spec(self, model: str, **changed: Any) -> EvalSpec:
        """The options of its evaluation on a model (by the paper's name).

        Args:
            changed: what is to be otherwise than in the paper (`limit`, `max_new_tokens`, ...).
        """
        own = {
            "protocol": self.protocol,
            "limit": self.samples,
            "batch": BATCH,
            "chat": self.chat,
            "max_new_tokens": self.max_new_tokens,
            "truncate_at": self.truncation(model),
        }
        return EvalSpec(**own | {name: value for name, value in changed.items() if value})

    def sweep(self, model: str, **changed: Any) -> dict[str, Any]:
        """The same as keys of a sweep's file, models and data left out."""
        spec = self.spec(
            model, **{k: v for k, v in changed.items() if k not in ("lengths", "tasks")}
        )
        own = {name: getattr(spec, name) for name in SHARED}
        return {
            "tasks": list(changed.get("tasks") or self.tasks),
            "methods": [text for text in self.methods.values() if text != FULL] or [FULL],
            "keeps": list(self.keeps),
            "protocols": [self.protocol],
            **(
                {"lengths": list(lengths)}
                if (lengths := changed.get("lengths") or self.lengths)
                else {}
            ),
            **{name: value for name, value in own.items() if value is not None},
        }


def papers() -> tuple[str, ...]:
    """The names of all papers."""
    return tuple(sorted(path.stem for path in (FOLDER / "recipes").glob("*.toml")))


@cache
def recipes() -> tuple[Recipe, ...]:
    """Every recipe, by paper, in the order of their files."""
    return tuple(one for paper in papers() for one in _read(paper))


def find(name: str) -> Recipe:
    """The recipe of a name such as curdkv/table-2.

    Raises:
        UnknownNameError: there is none; names the nearest.
    """
    found = {one.name: one for one in recipes()}
    if name not in found:
        raise UnknownNameError("recipe", name, found)
    return found[name]


def require_run(recipe: Recipe) -> None:
    """Refuse what `kvtrim papers run` cannot run.

    Raises:
        UsageError: an analysis, which has a command of its own, or nothing to run.
    """
    if recipe.kind == "analyze":
        raise UsageError(f"{recipe.name} is an analysis: kvtrim analyze {recipe.analyze}")
    if recipe.kind == "reason":
        raise UsageError(f"{recipe.name} has nothing to run: {recipe.reason}")


def paper_model(recipe: Recipe, name: str) -> str:
    """What the paper calls a model, or its own name where it is none of the paper's."""
    short = short_model(name)
    return next((own for own in recipe.models if short_model(own) == short), name)


def short_model(name: str) -> str:
    """A model's name without owner and company: llama-3.1-8b-instruct."""
    short = name.rstrip("/").rpartition("/")[2].lower().removeprefix("meta-")
    return {"mistral-nemo-instruct-2407": "mistral-nemo-12b-instruct"}.get(short, short)


def _read(paper: str) -> Iterator[Recipe]:
    whole = files.toml_of(FOLDER / "recipes" / f"{paper}.toml")
    printed = (
        json.loads((FOLDER / whole["scores"]).read_text("utf-8")) if "scores" in whole else {}
    )
    tables = {table["id"]: table for table in printed.get("tables", [])}
    timed = json.loads((FOLDER / "fastkv.json").read_text("utf-8")) if paper == "fastkv" else {}
    tables |= {table["id"]: table for table in timed.get("tables", [])}
    for item in whole["item"]:
        facts = [fact for fact in printed.get("facts", []) if fact["figure"] == item["id"]]
        yield _recipe(paper, whole, item, tables, facts)


def _recipe(
    paper: str,
    whole: Mapping[str, Any],
    item: Mapping[str, Any],
    tables: Mapping[str, Table],
    facts: Sequence[Table],
) -> Recipe:
    known = whole["methods"]
    named = item.get("methods") or whole.get("default_methods") or list(known)
    methods = {name: known[name] for name in named}
    methods = {FULL: FULL, **item["variants"]} if "variants" in item else methods
    methods = {name: str(Variant.parse(text)) for name, text in methods.items()}
    own = tuple(tables[name] for name in item.get("published", []))
    groups = whole.get("groups", {})
    tasks = item.get("tasks", whole.get("tasks", []))
    meant = [one for task in tasks for one in groups.get(task, [task])]
    shared = {
        name: item.get(name, whole.get(name)) for name in ("samples", "chat", "max_new_tokens")
    }
    met = {str(table.get("model")) for table in own} & set(whole["models"])
    models = {name: hub for name, hub in whole["models"].items() if name in met or not met}
    return Recipe(
        paper=paper,
        id=item["id"],
        about=item["about"],
        kind=item.get("kind", "eval"),
        title=whole["title"],
        arxiv=whole.get("arxiv", ""),
        models=models,
        methods=methods,
        notes={name: text for name, text in whole.get("notes", {}).items() if name in methods},
        tasks=tuple(meant),
        keeps=tuple(item.get("keeps", whole.get("keeps", []))),
        protocol=whole["protocol"],
        lengths=tuple(item.get("lengths", [])),
        truncate_at=whole.get("truncate_at", {}),
        new_tokens=item.get("new_tokens", 32),
        analyze=item.get("analyze", ""),
        reason=item.get("reason", ""),
        tried=_trials().get(f"{paper}/{item['id']}", _UNTRIED[item.get("kind", "eval")]),
        tables=own,
        facts=tuple(facts),
        **shared,
    )


@cache
def _trials() -> Mapping[str, str]:
    return files.record_of(FOLDER / "tried.json")


def _family(task: str) -> str:
    return next((name for name in _SIZES if task.startswith(name)), task)


def _size(task: str) -> tuple[int, int, int]:
    """Samples, tokens of a prompt and of an answer; a group's are those of all its tasks."""
    samples, prompt, answer = _SIZES.get(_family(task), (100, 4_000, 64))
    many = {"longbench": 16, "ruler-needles": 8}.get(task, 1)
    return samples * many, prompt * (4 if task.endswith("-50") else 1), answer
