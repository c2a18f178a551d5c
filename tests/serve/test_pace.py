"""How many tokens go along is what passes were seen to take."""

import pytest

from kvtrim.serve import pace as module
from kvtrim.serve.pace import Pace


@pytest.fixture
def watch(monkeypatch):
    """Lets a pace see passes that take as long as is said."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    pace = Pace()

    def see(tokens, seconds, questions=True):
        with pace.measure_step(tokens, questions):
            now[0] += seconds
        return pace

    return see


def test_questions_go_along_while_a_pass_takes_three_times_a_step_at_most(watch):
    for tokens, seconds in [(4, 0.1), (16, 0.15), (32, 0.2), (64, 0.29), (128, 0.5)]:
        pace = watch(tokens, seconds)
    assert pace.along(4) == 64 - 4
    assert pace.along(16) == 64 - 16  # 0.5 is above 3 * 0.15
    assert pace.along(0) == 512  # nobody waits for a token


def test_where_every_token_costs_as_much_few_go_along(watch):
    for power in range(10):
        pace = watch(1 << power, 0.1 * 2**power)
    assert {pace.along(answers) for answers in (1, 4, 5)} == {16}
    assert pace.along(100) == 256 - 100


def test_a_pass_is_believed_to_take_no_longer_than_smaller_ones_allow(watch):
    pace = watch(16, 0.1)
    assert pace.along(16) == 32 - 16  # 64 might take 0.4
    watch(32, 5.0)  # the machine was busy
    assert pace.along(16) == 32 - 16


def test_questions_do_not_count_as_time_of_a_step(watch):
    pace = watch(16, 0.05, questions=False)
    before = pace.step_s
    assert watch(64, 3.0).step_s == before
    assert watch(16, 3.0, questions=False).step_s > before
