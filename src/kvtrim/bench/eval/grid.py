"""What an evaluation measures, and in which order: tasks x methods x budgets, one protocol."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvtrim.bench.candidates import PLAIN, Candidate, candidates, require_chunks
from kvtrim.bench.eval.encode import Encoder
from kvtrim.bench.provenance import outside
from kvtrim.errors import UsageError
from kvtrim.methods.keep import Keep
from kvtrim.methods.settings import places
from kvtrim.records import Key
from kvtrim.records.spec import AWARE, EvalSpec
from kvtrim.tasks import Sample, Task, find_tasks
from kvtrim.tasks import places as outside_tasks

FULL = "full"


@dataclass(frozen=True)
class Grid(EvalSpec):
    """Everything that decides what an evaluation's figures are, apart from model and data."""

    tasks: tuple[Task, ...]
    cells: tuple[Candidate, ...]  # the full cache first
    own_tasks: tuple[str, ...] = ()  # those that do not come with kvtrim, as module:NAME
    raised: tuple[str, ...] = ()  # tasks whose answers may be longer than they say
    full_known: bool = False  # the full cache is only compared with: its lines are there already

    def __post_init__(self) -> None:
        """Refuse settings that nothing would act on."""
        super().__post_init__()
        require_chunks(self.cells, self.prefill_chunk)

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        methods: Sequence[str],
        keeps: Sequence[str],
        settings: dict[str, Any],
        spec: EvalSpec,
    ) -> "Grid":
        """Tasks, methods and budgets by name, with these options.

        Raises:
            UsageError: as `tasks` and `cells`, or `prefill_chunk` that no method acts on.
        """
        named, most = tasks(names), spec.max_new_tokens or 0
        return cls(
            tuple(_apply(task, spec) for task in named),
            cells(methods, keeps, settings),
            outside_tasks(names),
            tuple(task.name for task in named if task.max_new_tokens < most),
            **spec.options(),
        )

    @property
    def aware(self) -> bool:
        """The question is read together with the context."""
        return self.protocol == AWARE

    @property
    def written(self) -> tuple[Candidate, ...]:
        """The cells that lines are written of."""
        return self.cells[1:] if self.full_known else self.cells

    @property
    def samples_at_once(self) -> int:
        """Samples of similar length whose answers are generated together."""
        return max(1, self.batch // len(self.cells))

    def answer_tokens(self, task: Task) -> int:
        """How long an answer may be."""
        return min(task.max_new_tokens, self.max_new_tokens or task.max_new_tokens)

    def units(self, encoder: Encoder, samples: Sequence[Sample]) -> list[tuple[Sample, ...]]:
        """The samples of a task in the groups and the order in which they are measured."""
        size = self.samples_at_once
        if size == 1:
            return [(sample,) for sample in samples]
        sized = [(encoder.count(s.document.text + s.question), n) for n, s in enumerate(samples)]
        order = [samples[number] for _, number in sorted(sized)]
        return [tuple(order[at : at + size]) for at in range(0, len(order), size)]

    def key(self, task: Task, sample: Sample, cell: Candidate) -> Key:
        """What tells the lines of a run apart."""
        return {
            "task": task.name,
            "sample": sample.id,
            "method": cell.label,
            "keep": cell.keep,
            "protocol": self.protocol,
        }

    def record(self) -> dict[str, Any]:
        """What `run.json` says of it."""
        own = places(cell.method for cell in self.cells)
        return {
            "tasks": {
                task.name: {
                    "version": task.version,
                    "metric": task.metric,
                    "max_new_tokens": task.max_new_tokens,
                    "min_new_tokens": task.min_new_tokens,
                    "chat": task.chat,
                    "shots": task.shots,
                    "stop": list(task.stop),
                }
                for task in self.tasks
            },
            "methods": [cell.record() for cell in self.cells],
            "outside": outside({*own, *self.own_tasks}),
            **self.options(),
            "raised": list(self.raised),
            "decoding": "greedy",
        }


def _apply(task: Task, spec: EvalSpec) -> Task:
    """A task with what an evaluation asks of every task: the template, and longer answers."""
    most = max(task.max_new_tokens, spec.max_new_tokens or 0)
    chat = task.chat if spec.chat is None else spec.chat
    return replace(task, chat=chat, max_new_tokens=most)


def cells(
    methods: Sequence[str], keeps: Sequence[str], settings: dict[str, Any] | None = None
) -> tuple[Candidate, ...]:
    """The full cache, then every method with every budget. Errors as `candidates`."""
    chosen = candidates([FULL, *methods], [str(Keep.parse(k)) for k in keeps], settings)
    return tuple(cell for cell in chosen if cell.method != PLAIN)


def tasks(names: Sequence[str]) -> tuple[Task, ...]:
    """Tasks by name, groups of them, or `module:NAME` for one of your own; each of them once.

    Raises:
        UnknownNameError: no such task.
        UsageError: no such module, or what has that name is no task.
    """
    if not (found := find_tasks(names)):
        raise UsageError("no task; name one with --task, see kvtrim eval --help")
    return tuple(found)
