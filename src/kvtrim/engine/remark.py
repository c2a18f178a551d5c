"""What a method really holds of a prompt beside what was asked for, and why the two differ.

`keep` is entries per KV head on average over the model. Some methods cannot hold just that: query
heads that store entries of their own, layers that read a part of the prompt, parts that are kept
as a whole. Whoever answers says so, once.
"""

from dataclasses import replace

from kvtrim.engine.state import State
from kvtrim.errors import UsageError
from kvtrim.methods.keep import Keep
from kvtrim.methods.method import Method

CLEARLY = 0.05
"""What is held differs clearly from what was asked by more than this share of it, and an entry."""


def remark(method: Method, keep: Keep, state: State) -> str | None:
    """One sentence where a prompt holds clearly more or less than was asked for it, else None.

    Of several prompts, about the one that is furthest off. None too while the prompt is not
    complete, and for a method that is not meant to evict.
    """
    if method.full or not state.settled or not state.keeps:
        return None
    group = _group(state)
    found = []
    for (tokens, held), (_, asked) in zip(state.settled, state.keeps, strict=True):
        asked *= group if keep.kind == "bytes" else 1  # bytes count the heads that are stored
        found.append((held, min(asked, float(tokens)), tokens))
    held, asked, tokens = max(found, key=lambda one: abs(one[0] / one[1] - 1))
    if not _apart(held, asked):
        return None
    reasons = _more(method, held, asked, group) if held > asked else method.holds_less
    text = (
        f"keep={keep} asks for {asked:,.0f} of {tokens:,} entries per KV head, "
        f"{held:,.0f} are held"
    )
    return f"{text}: {'; '.join(reasons)}" if reasons else text


def remark_later(method: Method, keep: Keep, state: State) -> str | None:
    """What is held beyond the budget because it came after the prompt, and what to do; or None."""
    if method.schedule.every is not None or method.full or not state.keeps:
        return None
    if state.added <= max(kept for kept, _ in state.keeps):
        return None
    return (
        f"keep={keep} was applied to the prompt, the first pass over this cache; later passes, "
        "and answers before them, are added to it and never evicted. If they belong to the "
        f"prompt, pass prompt_tokens=LENGTH; {_remedy(method)}"
    )


def _remedy(method: Method) -> str:
    """How to evict in further turns."""
    try:
        replace(method, schedule=replace(method.schedule, every=64))
    except UsageError:
        return (
            "this method cannot evict again after the prompt: read each further turn with all "
            "before it into a new cache, or take a method that can, with every=64"
        )
    return "to evict in further turns too, pass every=64, or another number of tokens"


def _apart(held: float, asked: float) -> bool:
    return abs(held - asked) > max(1, CLEARLY * asked)


def _more(method: Method, held: float, asked: float, group: int) -> list[str]:
    """Why a method holds more than it was asked for."""
    reasons = [f"every query head stores its own, {group} per KV head"] if group > 1 else []
    protected = method.policy.sinks + method.policy.recent(int(asked))
    if protected >= asked:
        reasons.append(f"window and sinks alone are {protected}")
    return [*reasons, *(method.holds_more if _apart(held / group, asked) else [])]


def _group(state: State) -> int:
    """Heads that store entries of their own, per KV head of the model."""
    held = next(held for held in state.layers if held.store is not None)
    return held.heads // held.kv_heads
