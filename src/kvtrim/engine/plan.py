"""What is due in one pass over the model: reading, observing, choosing, evicting."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvtrim.engine.state import State
from kvtrim.errors import BudgetError, UsageError
from kvtrim.methods.keep import Keep
from kvtrim.methods.method import Method


@dataclass(frozen=True)
class Plan:
    """What is due in one pass."""

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
    probe: bool = False  # the new tokens are a probe's, to be forgotten again


def in_prompt(state: State, prompt_tokens: int | None) -> bool:
    """The pass at hand, or else the next one, reads the prompt."""
    return state.reading.seen < (prompt_tokens or 1)


def planned(
    method: Method,
    state: State,
    keep: Keep,
    columns: int,
    lengths: Sequence[int],
    prompt_tokens: int | None,
) -> Plan:
    """What is due in a pass over so many columns.

    Args:
        lengths: tokens of each prompt after this pass.
        prompt_tokens: columns of the prompt if it comes in several passes.

    Raises:
        UsageError: a part of a prompt, for a method that has to see all of it at once.
        BudgetError: a number of tokens that the method's propagation cannot come down to.
    """
    schedule, policy, prompt = method.schedule, method.policy, in_prompt(state, prompt_tokens)
    if policy.probes:
        return Plan()  # the cut waits for the probe
    propagate = prompt and method.propagation.narrows
    if propagate and (state.reading.seen or columns < (prompt_tokens or 1)):
        raise UsageError(
            f"{type(method.propagation).__name__} needs the whole prompt in one pass, to choose "
            "what deeper layers read; leave prefill_chunk out, or use propagation=everything"
        )
    if propagate:
        _require_reachable(method, keep, lengths, len(state.layers))
    coming = max(0, (prompt_tokens or 1) - state.reading.seen - columns) if prompt else 0
    before_it = state.reading.lengths or [0] * len(lengths)
    new = [length - before for length, before in zip(lengths, before_it, strict=True)]
    closes = _closing(method, state, prompt, new)
    if prompt:
        due = [not coming or (schedule.chunks and count > 0) for count in new]
    else:
        due = _due(method, state, lengths, closes)
    cut = any(due)
    more = coming > 0
    again = schedule.every is not None or more
    before = cut and schedule.ahead and not prompt
    return Plan(
        before=before,
        after=cut and not before,
        due=due,
        observe=policy.observes(not prompt) and (cut or again),
        again=again,
        foresee=policy.foresees and (cut or again),
        carry=again and (policy.observes(not more) or policy.foresees),
        closes=closes,
        propagate=propagate,
        coming=coming,
        lookback=policy.lookback(),
    )


def _closing(method: Method, state: State, prompt: bool, new: Sequence[int]) -> list[bool]:
    """For each prompt whether what it reads now was handed over, not generated."""
    if method.schedule.region != "generated":
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
    return [
        length - since >= every and not closed
        for length, since, closed in zip(lengths, state.due_at, closes, strict=True)
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
