"""How much of a prompt to read between others' tokens, from what passes were seen to take."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_ALONE = 512  # tokens of a chunk while nobody is answering
_LEAST = 16
_SHARE = 1.0  # of a step's time, for others' documents
_SLOWER = 3.0  # how much longer a step may take for others' questions
_NEW = 0.3  # weight of the last measurement


class Pace:
    """Seconds of a decoding step, and tokens of a prompt that are read in a second."""

    def __init__(self) -> None:
        self.step_s, self.rate = 0.05, 300.0
        self.answer_s = 2.0  # of one whole answer, roughly
        self._passes: dict[int, float] = {}  # seconds, by tokens rounded up to a power of two

    def chunk(self, others: bool, spent: int) -> int:
        """Tokens of a document to read now; `spent` went along with others' already."""
        if not others:
            return _ALONE
        return max(_LEAST, int(self.rate * self.step_s * _SHARE)) - spent

    def along(self, answers: int) -> int:
        """Tokens of questions that go along in a pass with one token of each answer.

        A pass costs much however few its tokens are, so it is better to read many at once.
        """
        if not answers:
            return _ALONE
        most, least = self._seconds(answers) * _SLOWER, _LEAST + answers
        sizes = [1 << power for power in range(_ALONE.bit_length())]
        return (
            max([least, *(n for n in sizes if n > least and self._seconds(n) <= most)]) - answers
        )

    def _seconds(self, tokens: int) -> float:
        """Of a pass over so many, at most: twice as many never take more than twice as long."""
        size = _round_up(tokens)
        bounds = [s * max(1, size / n) for n, s in self._passes.items() if n <= size]
        return min(bounds, default=self._passes[min(self._passes)] if self._passes else 0.0)

    def wait_s(self, queued: int) -> int:
        """When somebody who finds so many waiting may try again."""
        return max(1, min(60, round(queued * self.step_s * 4)))

    @contextmanager
    def measure_chunk(self, tokens: int) -> Iterator[None]:
        """A pass over a part of a document."""
        start = time.perf_counter()
        yield
        took = time.perf_counter() - start
        if tokens >= _LEAST and took > 0:
            self.rate += _NEW * (tokens / took - self.rate)

    @contextmanager
    def measure_step(
        self, tokens: int, questions: bool, captures: Callable[[], int] = lambda: 0
    ) -> Iterator[None]:
        """A pass over so many tokens of answers, and of questions if there are any.

        Args:
            captures: how many there were by now; a pass that makes one says nothing of others.
        """
        start, before = time.perf_counter(), captures()
        yield
        took = time.perf_counter() - start
        if captures() != before:
            return
        size = _round_up(tokens)
        usual = self._passes.get(size, took)
        self._passes[size] = usual + _NEW * (took - usual)
        if not questions:
            self.step_s += _NEW * (took - self.step_s)


def _round_up(tokens: int) -> int:
    """To a power of two."""
    return 1 << (tokens - 1).bit_length()
