"""How much of a prompt to read between others' tokens, from what passes were seen to take."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

_ALONE = 512  # tokens of a chunk while nobody is answering
_LEAST = 16
_SHARE = 1.0  # of a step's time, for others' prompts
_NEW = 0.3  # weight of the last measurement


class Pace:
    """Seconds of a decoding step, and tokens of a prompt that are read in a second."""

    def __init__(self) -> None:
        self.step_s, self.rate = 0.05, 300.0

    def chunk(self, others: bool, spent: int) -> int:
        """Tokens to read now; `spent` went along with others' already."""
        if not others:
            return _ALONE
        return max(_LEAST, int(self.rate * self.step_s * _SHARE)) - spent

    def wait_s(self, queued: int) -> int:
        """When somebody who finds so many waiting may try again."""
        return max(1, min(60, round(queued * self.step_s * 4)))

    @contextmanager
    def measure(self, read: int, steps: int = 0) -> Iterator[None]:
        """A pass over so many tokens of prompts, or over one token of so many answers."""
        start = time.perf_counter()
        yield
        took = time.perf_counter() - start
        if steps:
            self.step_s += _NEW * (took - self.step_s)
        elif read >= _LEAST and took > 0:
            self.rate += _NEW * (read / took - self.rate)
