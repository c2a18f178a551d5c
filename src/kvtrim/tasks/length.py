"""Prompts as long as they were asked for: how many sentences, words or documents fit in."""

from collections.abc import Callable

from kvtrim.errors import UsageError
from kvtrim.tasks.base import Request, Sample

MADE = 100  # samples of a task whose prompts are made, unless told otherwise
_FREE = 256  # a prompt is long enough when less than one part in so many is left over
_TRIES = 16


def largest(
    make: Callable[[int], Sample],
    request: Request,
    answer: int,
    least: int,
    most: int | None = None,
) -> Sample:
    """The largest sample that leaves room for an answer of so many tokens.

    `make` gives the same sample for the same number of units, and longer ones for more of them.
    The number is guessed from the tokens of two small samples and then bracketed, so that a
    handful of texts are tokenised for each sample, however long it is. The search ends when what
    is left over is less than a unit, or than a small part of the whole.

    Raises:
        UsageError: not even the `least` units fit.
    """
    room = request.length - answer

    def size(sample: Sample) -> int:
        return request.tokens(sample.document.text + sample.question + sample.prefix)

    low, best = least, make(least)
    used = size(best)
    if used > room:
        raise UsageError(
            f"the shortest prompt of this task has {used} tokens and its answer {answer}, which "
            f"is more than --length {request.length}; ask for at least {used + answer}"
        )
    free = room / _FREE
    high, over = 0, 0  # the fewest units known not to fit; 0 = none yet
    each = 0.0  # tokens of one unit, as far as known
    width = 0
    for _ in range(_TRIES):
        if low == most or high == low + 1 or (each and room - used < max(each, free)):
            break
        guess = low + (int((room - used - free / 2) / each) if each else max(1, least))
        if high and width and 2 * (high - low) > width:  # the guesses creep up from one side
            guess = (low + high) // 2
        width = high - low if high else 0
        guess = max(low + 1, min(guess, high - 1 if high else most or guess))
        sample = make(guess)
        tokens = size(sample)
        if tokens <= room:
            each = max((tokens - used) / (guess - low), 1e-3)
            low, best, used = guess, sample, tokens
        else:
            high, over = guess, tokens
        if high:
            each = max((over - used) / (high - low), 1e-3)
    return best
