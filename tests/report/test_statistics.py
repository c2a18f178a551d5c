import itertools
import math
import statistics as plain

import numpy as np
import pytest

from kvtrim.errors import UsageError
from kvtrim.report import statistics
from kvtrim.report.statistics import (
    change,
    interval,
    mean,
    mean_of_groups,
    mean_of_means,
    standard_error,
    summary,
)


def test_mean_and_standard_error_by_hand():
    scores = [1.0, 2.0, 3.0, 6.0]  # squares of deviations: 4, 1, 0, 9; variance 14 / 3
    assert mean(scores) == 3.0
    assert standard_error(scores) == pytest.approx(math.sqrt(14 / 3 / 4), rel=1e-15)
    assert standard_error(scores) == pytest.approx(plain.stdev(scores) / 2)
    assert standard_error([0, 1]) == 0.5


def test_nothing_has_no_mean_and_one_score_no_error():
    nothing, one = summary([]), summary([0.25])
    assert (nothing.n, nothing.mean, nothing.se, nothing.low, nothing.high) == (0, *[None] * 4)
    assert (one.n, one.mean, one.se, one.low, one.high) == (1, 0.25, None, None, None)


def test_equal_scores_leave_no_doubt():
    found = summary([0.5] * 7)
    assert (found.mean, found.se, found.low, found.high) == (0.5, 0.0, 0.5, 0.5)


def test_the_interval_of_two_scores_is_known_exactly():
    # the mean of two draws from {0, 1} is 0, 1/2, 1 with chances 1/4, 1/2, 1/4
    assert interval([0, 1]) == (0.0, 1.0)
    assert interval([0, 1], level=0.4) == (0.5, 0.5)


def test_the_interval_is_that_of_all_samples_that_can_be_drawn():
    scores = [0.0, 1.0, 3.0, 4.0, 8.0]
    every = [sum(drawn) / 5 for drawn in itertools.product(scores, repeat=5)]
    low, high = np.quantile(every, [0.025, 0.975])
    assert interval(scores, resamples=100_000) == pytest.approx((low, high), abs=0.05)


def test_ten_right_of_a_hundred_give_the_binomial_interval():
    # the 2.5 % and 97.5 % points of Binomial(100, 0.1) are 5 and 16
    low, high = interval([1] * 10 + [0] * 90)
    assert (low, high) == (pytest.approx(0.05, abs=1e-12), pytest.approx(0.16, abs=0.01 + 1e-12))


def test_the_same_seed_gives_the_same_interval_in_any_order():
    scores = list(np.random.default_rng(1).random(40))
    assert interval(scores) == interval(scores[::-1]) == interval(iter(scores))
    assert interval(scores) != interval(scores, seed=1)


@pytest.mark.parametrize("scores", [[0, 1, 1, 0, 1], [0.31, 0.12, 0.87, 0.5], [0.5] * 3])
def test_every_figure_of_the_same_scores_rests_on_the_same_draws(scores):
    alone = summary(scores)
    for figure in (mean_of_means([scores]), mean_of_groups([[scores[::-1]]])):
        assert (figure.low, figure.high, figure.samples) == (alone.low, alone.high, alone.n)
        assert figure.value == pytest.approx(alone.mean, rel=1e-15)
    # against a full cache that always scores 1, the change is the mean less 1
    found = change([[(score, 1.0) for score in scores]])
    assert (found.low, found.high) == pytest.approx((alone.low - 1, alone.high - 1), abs=1e-15)


def test_tasks_of_one_figure_are_drawn_apart():
    scores = list(np.random.default_rng(1).random(40))
    one, two = mean_of_means([scores]), mean_of_means([scores, scores])
    # of independent draws, the mean of two is narrower by the root of two
    ratio = (one.high - one.low) / (two.high - two.low)
    assert ratio == pytest.approx(math.sqrt(2), rel=0.05)


def test_many_different_scores_are_drawn_in_parts(monkeypatch):
    scores = list(np.random.default_rng(1).random(50))
    whole = interval(scores, resamples=1000)
    monkeypatch.setattr("kvtrim.report.statistics._AT_ONCE", 50 * 7)
    statistics._counts.cache_clear()
    assert interval(scores, resamples=1000) == whole


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_refused(score):
    with pytest.raises(UsageError, match="leave out"):
        mean([1.0, score])


@pytest.mark.parametrize("wrong", [{"level": 95}, {"level": 0}, {"resamples": 0}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(UsageError, match="between 0 and 1"):
        interval([0, 1], **wrong)
