"""What is due in one pass over the model: a table of stages and events, and what a method adds.

Stages are what a session has come to, events what the pass brings. `TABLE` says for each pair what
happens, or why it cannot be; `plan_pass` adds what depends on the method, column by column.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Literal

from kvtrim.engine.generated import asked_of_blocks, newest_tokens
from kvtrim.engine.state import State
from kvtrim.errors import BudgetError, CacheError, UsageError
from kvtrim.methods.keep import Keep
from kvtrim.methods.method import Method


class Stage(Enum):
    """What a session has come to."""

    EMPTY = "nothing was read"
    READING = "a part of the prompt was read"
    UNPROBED = "the prompt was read, and the policy's probe was not"
    COMPLETE = "the prompt was read, and cut"


class Event(Enum):
    """What a pass brings."""

    WHOLE = "the whole prompt"
    PART = "a part of the prompt, and more of it is coming"
    LAST = "the last part of the prompt"
    LATER = "tokens after the prompt"
    PROBE = "a part of the probe"
    LAST_PROBE = "the last part of the probe"


@dataclass(frozen=True)
class Action:
    """What is due whatever the method."""

    reads: Literal["prompt", "later", "probe"]  # a probe's tokens are forgotten again
    cuts: Literal["all", "chunks", "schedule", "none"]  # every prompt; every prompt if the method
    # has chunks; those whose schedule says so; none
    waits: bool = False  # for the probe, if there is one: nothing is done until then


@dataclass(frozen=True)
class Refusal:
    """Why an event cannot come at a stage."""

    why: str


_BEHIND = Refusal("the prompt was read to its end")
_PART = Refusal("a part of the prompt was read")
_NOTHING = Refusal("nothing was read yet")
_UNREAD = Refusal("the prompt was not read to its end")
_PROBED = Refusal("the prompt was probed, or its policy does not probe")

TABLE: Mapping[tuple[Stage, Event], Action | Refusal] = MappingProxyType(
    {
        (Stage.EMPTY, Event.WHOLE): Action("prompt", "all", waits=True),
        (Stage.EMPTY, Event.PART): Action("prompt", "chunks", waits=True),
        (Stage.EMPTY, Event.LAST): _NOTHING,
        (Stage.EMPTY, Event.LATER): _NOTHING,
        (Stage.EMPTY, Event.PROBE): _NOTHING,
        (Stage.EMPTY, Event.LAST_PROBE): _NOTHING,
        (Stage.READING, Event.WHOLE): _PART,
        (Stage.READING, Event.PART): Action("prompt", "chunks", waits=True),
        (Stage.READING, Event.LAST): Action("prompt", "all", waits=True),
        (Stage.READING, Event.LATER): _UNREAD,
        (Stage.READING, Event.PROBE): _UNREAD,
        (Stage.READING, Event.LAST_PROBE): _UNREAD,
        (Stage.UNPROBED, Event.WHOLE): _BEHIND,
        (Stage.UNPROBED, Event.PART): _BEHIND,
        (Stage.UNPROBED, Event.LAST): _BEHIND,
        (Stage.UNPROBED, Event.LATER): Action("later", "schedule", waits=True),  # it fits as it is
        (Stage.UNPROBED, Event.PROBE): Action("probe", "none"),
        (Stage.UNPROBED, Event.LAST_PROBE): Action("probe", "all"),
        (Stage.COMPLETE, Event.WHOLE): _BEHIND,
        (Stage.COMPLETE, Event.PART): _BEHIND,
        (Stage.COMPLETE, Event.LAST): _BEHIND,
        (Stage.COMPLETE, Event.LATER): Action("later", "schedule", waits=True),
        (Stage.COMPLETE, Event.PROBE): _PROBED,
        (Stage.COMPLETE, Event.LAST_PROBE): _PROBED,
    }
)
"""Every stage and event, once."""


@dataclass(frozen=True)
class Plan:
    """What is due in one pass."""

    reads: Literal["prompt", "later", "probe"] = "prompt"
    before: bool = False  # evict ahead of the new tokens
    after: bool = False  # evict once they have attended
    due: Sequence[bool] = ()  # from which prompts, where that is not all of them
    observe: bool = False  # the policy updates its running statistic
    foresee: bool = False  # it scores the new tokens once and for all
    again: bool = False  # what is held now will be scored by a later pass
    carry: bool = False  # and the policy's statistic will be needed then
    closes: Sequence[bool] = ()  # prompts whose tokens read are not generated, where the
    # schedule tells them apart
    propagate: bool = False  # a part of the prompt goes on to deeper layers
    coming: int = 0  # columns of the prompt that later passes bring
    lookback: int = 0  # how many of the last queries the policy reads
    asked: int = 0  # and how many the schedule asks beyond that, now and later

    @property
    def probe(self) -> bool:
        """The new tokens are a probe's, to be forgotten again."""
        return self.reads == "probe"


def stage_of(method: Method, state: State, prompt_tokens: int | None) -> Stage:
    """What a session has come to."""
    if in_prompt(state, prompt_tokens):
        return Stage.READING if state.reading.seen else Stage.EMPTY
    return Stage.UNPROBED if method.policy.probes and not state.probed else Stage.COMPLETE


def in_prompt(state: State, prompt_tokens: int | None) -> bool:
    """The pass at hand, or else the next one, reads the prompt."""
    return state.reading.seen < (prompt_tokens or 1)


def look_up(stage: Stage, event: Event) -> Action:
    """What is due when an event comes at a stage.

    Raises:
        CacheError: it cannot come then.
    """
    action = TABLE[stage, event]
    if isinstance(action, Refusal):
        raise CacheError(f"{event.value} came to this cache, but {action.why}; start a new cache")
    return action


def plan_pass(
    method: Method,
    state: State,
    keep: Keep,
    columns: int,
    lengths: Sequence[int],
    prompt_tokens: int | None,
) -> Plan:
    """What is due in a pass over so many columns of tokens that stay.

    Args:
        lengths: tokens of each prompt after this pass.
        prompt_tokens: columns of the prompt if it comes in several passes.

    Raises:
        UsageError: a part of a prompt, for a method that has to see all of it at once.
        BudgetError: a number of tokens that the method's propagation cannot come down to.
    """
    schedule, policy = method.schedule, method.policy
    stage = stage_of(method, state, prompt_tokens)
    left = (prompt_tokens or 1) - state.reading.seen
    action = look_up(stage, _event(stage, columns, left))
    prompt = action.reads == "prompt"
    coming = max(0, left - columns) if prompt else 0
    if policy.probes and action.waits:
        return Plan(action.reads, coming=coming)
    before_it = state.reading.lengths or [0] * len(lengths)
    new = [length - before for length, before in zip(lengths, before_it, strict=True)]
    closes = _is_input(method, state, prompt, new)
    if action.cuts == "schedule":
        due = _due(method, state, lengths, closes)
    else:
        due = [action.cuts == "all" or (schedule.chunks and count > 0) for count in new]
    blocks = schedule.region == "blocks" and not prompt
    cut, again = any(due), schedule.every is not None or coming > 0
    before = cut and schedule.ahead and not prompt
    plan = Plan(
        action.reads,
        before=before,
        after=cut and not before,
        due=due,
        observe=policy.observes(not prompt) and (cut or again),
        again=again,
        foresee=policy.foresees and (cut or again),
        carry=again and (policy.observes(not coming) or policy.foresees),
        closes=closes,
        propagate=prompt and method.propagation.narrows,
        coming=coming,
        lookback=policy.lookback(),
        asked=asked_of_blocks(method, state) if blocks else 0,
    )
    if plan.propagate:
        _require_whole(method, stage, coming)
        _require_reachable(method, keep, lengths, len(state.layers))
    return plan


def plan_probe(method: Method, state: State, prompt_tokens: int | None, last: bool) -> Plan:
    """What is due in a pass over a probe's tokens.

    Raises:
        CacheError: there is no prompt to probe.
    """
    stage = stage_of(method, state, prompt_tokens)
    action = look_up(stage, Event.LAST_PROBE if last else Event.PROBE)
    cut = action.cuts == "all"
    return Plan(action.reads, after=cut, observe=True, again=not cut, carry=not cut)


def _event(stage: Stage, columns: int, left: int) -> Event:
    """What a pass brings over so many columns, if so many of the prompt are unread."""
    if stage in (Stage.UNPROBED, Stage.COMPLETE):
        return Event.LATER
    if columns < left:
        return Event.PART
    return Event.WHOLE if stage is Stage.EMPTY else Event.LAST


def _require_whole(method: Method, stage: Stage, coming: int) -> None:
    """Refuse parts of a prompt where deeper layers read a part of it."""
    if stage is Stage.READING or coming:
        raise UsageError(
            f"{type(method.propagation).__name__} needs the whole prompt in one pass, to choose "
            "what deeper layers read; leave prefill_chunk out, or use propagation=everything"
        )


def _is_input(method: Method, state: State, prompt: bool, new: Sequence[int]) -> list[bool]:
    """For each prompt whether what it reads now was handed over, not generated."""
    if method.schedule.region == "all":
        return [False] * len(new)
    handed = state.reading.seen < state.expected
    return [prompt or count > 1 or (handed and count > 0) for count in new]


def _due(
    method: Method, state: State, lengths: Sequence[int], closes: Sequence[bool]
) -> list[bool]:
    """For each prompt, complete before, whether its schedule evicts in this pass.

    A prompt's own tokens count, so that padding beside other prompts changes nothing.
    """
    every = method.schedule.every
    if every is None:
        return [False] * len(lengths)
    if method.schedule.region == "blocks":
        windows = [newest_tokens(method, start) for start, _ in state.generated]
        starts = [start for start, _ in state.generated]
    else:
        windows, starts = [0] * len(lengths), [0] * len(lengths)
    return [
        length - max(since, start + window) >= every and not closed
        for length, since, start, window, closed in zip(
            lengths, state.due_at, starts, windows, closes, strict=True
        )
    ]


def _require_reachable(method: Method, keep: Keep, lengths: Sequence[int], layers: int) -> None:
    """A share or a size is lifted to what can be reached, a number of tokens is not."""
    for prompt in lengths if keep.kind == "tokens" else []:
        least = method.propagation.least(prompt, layers)
        if keep.amount < min(prompt, least):
            raise BudgetError(
                f"keep={keep} is out of reach of {type(method.propagation).__name__} over "
                f"{layers} layers: it holds at least {least:,} of {prompt:,} tokens per head on "
                f"average. Use keep={least} or more, or evict from what it holds as well "
                "(--set policy=snapkv --set budget=uniform --set decay=0)"
            )
