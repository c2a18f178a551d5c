"""A sweep: the grid of `kvtrim eval` over several models, protocols and lengths, from a TOML file.

Every (model, protocol, length) is a job: one folder, with the files that `kvtrim eval` alone would
have written there. A job is cut into pieces of work, each a few samples of one task under all its
methods and budgets, since those share a prefill. `queue` gives them to workers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from kvtrim import files
from kvtrim.bench.eval.grid import Grid
from kvtrim.errors import FileError, UnknownNameError, UsageError
from kvtrim.methods.variant import Variant
from kvtrim.records.spec import AGNOSTIC, AWARE, BATCH, PROTOCOLS, SHARED, EvalSpec, require


@dataclass(frozen=True)
class Job(EvalSpec):
    """One evaluation, as plain values that go to any process."""

    model: str
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    keeps: tuple[str, ...]
    settings: tuple[tuple[str, str], ...]
    data: str | None
    device: str | None
    dtype: str | None
    threads: int | None

    @property
    def name(self) -> str:
        """Of its folder."""
        short = Path(self.model).name.removesuffix(".gguf").lower()
        return "-".join([short, self.protocol, *([str(self.length)] if self.length else [])])

    def grid(self) -> Grid:
        """What is measured."""
        return Grid.of(self.tasks, self.methods, self.keeps, dict(self.settings), self)


@dataclass(frozen=True)
class Sweep:
    """What a TOML file asks for."""

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    keeps: tuple[str, ...]
    protocols: tuple[str, ...]
    models: tuple[str, ...] = ("smollm2",)
    lengths: tuple[int | None, ...] = (None,)
    set: Mapping[str, str] = field(default_factory=dict)  # parameters of the methods
    spec: EvalSpec = field(default_factory=lambda: EvalSpec(batch=BATCH))  # what jobs share
    data: str | None = None  # seen from the TOML file
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None  # CPU threads of a worker
    gpus: int = 1  # GPUs of a worker; more with device = "auto-map", for models larger than one
    chunk: int = 8  # samples of a piece of work
    retries: int = 2  # how often a piece is tried again after its worker died

    def __post_init__(self) -> None:
        """Refuse what cannot be measured, before anything is."""
        for each in fields(self):
            if each.name != "spec":
                _require(each.name, getattr(self, each.name))
        for protocol in self.protocols:
            if protocol not in PROTOCOLS:
                raise UsageError(f"protocols: {protocol!r} is none; use {AWARE!r} or {AGNOSTIC!r}")
        names = [job.name for job in self.jobs()]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise UsageError(f"two of the models have folders of one name: {min(twice)}")
        self.jobs()[0].grid()

    def jobs(self) -> list[Job]:
        """Every evaluation, in order."""
        shared = ("tasks", "methods", "keeps", "data", "device", "dtype", "threads")
        own = {name: getattr(self, name) for name in shared}
        own |= {name: getattr(self.spec, name) for name in SHARED}
        settings = tuple(self.set.items())
        return [
            Job(model=model, protocol=protocol, length=length, settings=settings, **own)
            for model in self.models
            for protocol in self.protocols
            for length in self.lengths
        ]

    def record(self) -> dict[str, Any]:
        """What it asks for, as JSON; how the work is cut up does not count."""
        own = {k: v for k, v in asdict(self).items() if k not in ("spec", *_WORK)}
        return own | {name: getattr(self.spec, name) for name in SHARED}


_WORK = ("gpus", "chunk", "retries")
KEYS = (*(each.name for each in fields(Sweep) if each.name != "spec"), *SHARED)
"""What a TOML file may say."""


@dataclass(frozen=True)
class Piece:
    """A piece of work: some units of a job, or all that comes before (`stop` is 0)."""

    job: Job
    folder: str
    start: int = 0
    stop: int = 0
    samples: int = 0
    tried: int = 0

    def __str__(self) -> str:
        what = f"samples from {self.start}" if self.stop else "reading the tasks"
        return f"{self.job.name}, {what}"


def load(path: Path) -> Sweep:
    """Read a TOML file.

    Raises:
        UsageError: no such file, no TOML, an unknown key, or a value that cannot be.
    """
    try:
        given = files.toml_of(path)
    except FileError as error:
        raise UsageError(str(error)) from None
    return settle(given, str(path), path.parent)


def settle(given: Mapping[str, Any], where: str, folder: Path) -> Sweep:
    """The sweep of such keys and values.

    Args:
        where: they were given, for messages.
        folder: from which `data` is seen.

    Raises:
        UsageError: an unknown key, one that is missing, or a value that cannot be.
    """
    for name in given:
        if name not in KEYS:
            raise UnknownNameError(f"key in {where}", name, KEYS)
    missing = [n for n in ("tasks", "methods", "keeps", "protocols") if n not in given]
    if missing:
        raise UsageError(f"{where} names no {' and no '.join(missing)}")
    try:
        for name, value in given.items():
            _require(name, value)
        made = {name: _value(name, value) for name, value in given.items()}
        if made.get("data"):
            made["data"] = str((folder / made["data"]).resolve())
        asked: dict[str, Any] = {name: made.pop(name) for name in SHARED if name in made}
        return Sweep(**made, spec=EvalSpec(**{"batch": BATCH, **asked}))
    except UnknownNameError:
        raise
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def _value(name: str, value: Any) -> Any:
    """Lists as tuples; methods, budgets and parameters as options have them."""
    if name == "methods":
        return tuple(_variant(one) for one in value)
    if name == "keeps":
        return tuple(str(keep) for keep in value)
    if name == "set":
        return {key: str(one) for key, one in value.items()}
    return tuple(value) if name in _LISTS else value


def _variant(given: Any) -> str:
    """A method as text; a table names it, and its parameters: {name = "snapkv", window = 16}."""
    if isinstance(given, str):
        return given
    own = {key: value for key, value in given.items() if key != "name"}
    return str(Variant(given["name"], own))


def _is_method(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, Mapping) and _is_text(value.get("name")))


def _require(name: str, value: Any) -> None:
    """Refuse a value that a key cannot have."""
    if value is None:
        return
    if name == "set":
        if not isinstance(value, Mapping):
            raise UsageError("set must be a table: [set], and window = 16 below it")
        return
    if name in SHARED:
        require(name, value)
        return
    if name not in _LISTS:
        _require_one(name, value, value)
        return
    if not isinstance(value, list | tuple):
        raise UsageError(f"{name} must be a list, for example {name} = [{value!r}]")
    if not value:
        raise UsageError(f"{name} is empty; name at least one, or leave the key out")
    for one in value:
        if one is not None:
            _require_one(name, one, value)
    twice = [one for number, one in enumerate(value) if one in value[:number]]
    if twice:
        raise UsageError(f"{name} names {twice[0]!r} twice")


def _require_one(name: str, one: Any, shown: Any) -> None:
    """Refuse a single value, or one of a list."""
    right, remedy = _KINDS[name]
    if not right(one):
        raise UsageError(f"{name} = {shown!r}: use {remedy}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_budget(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _is_whole(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= least  # true is no number here


_LISTS = ("tasks", "methods", "keeps", "protocols", "models", "lengths")
_TEXT = (_is_text, "text in quotes")
_POSITIVE = (_is_whole(1), "a whole number of at least 1")
_COUNT = (_is_whole(0), "a whole number of at least 0")
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {  # what is right, and how to say it
    **dict.fromkeys(("tasks", "protocols", "models"), (_is_text, "texts in quotes")),
    "methods": (_is_method, "texts in quotes, or tables: {name = 'snapkv', window = 16}"),
    **dict.fromkeys(("data", "device", "dtype"), _TEXT),
    **dict.fromkeys(("threads", "gpus", "chunk"), _POSITIVE),
    "retries": _COUNT,
    "lengths": (_is_whole(1), "whole numbers of at least 1, without quotes"),
    "keeps": (_is_budget, "budgets such as 256 or '10%'"),
}


def pieces(job: Job, folder: str, units: Sequence[tuple[str, int]], chunk: int) -> list[Piece]:
    """A job cut up: runs of units of one task with about so many samples.

    Args:
        units: task and number of samples of each.
    """
    found: list[Piece] = []
    start, samples = 0, 0
    for number, (task, count) in enumerate(units):
        samples += count
        last = number + 1 == len(units) or units[number + 1][0] != task
        if last or samples >= chunk:
            part = f"{folder}/parts/{start:06d}-{number + 1:06d}"
            found.append(Piece(job, part, start, number + 1, samples))
            start, samples = number + 1, 0
    return found
