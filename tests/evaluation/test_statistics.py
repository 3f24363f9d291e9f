"""Intervals against resamples that were counted by hand, and against each other where they are drawn."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from her_nemo.evaluation.statistics import (
    bootstrap_mean,
    mean_over_runs,
    paired_bootstrap,
)


def test_two_scenes_by_hand() -> None:
    # Means 0, 5, 10 with probability 1/4, 1/2, 1/4.
    wide = bootstrap_mean([0.0, 10.0], level=0.95)
    assert (wide.mean, wide.low, wide.high, wide.scenes) == (5.0, 0.0, 10.0, 2)
    # The lower quarter is reached by 0 exactly; three quarters by 5.
    assert bootstrap_mean([0.0, 10.0], level=0.5).low == 0.0
    assert bootstrap_mean([0.0, 10.0], level=0.5).high == 5.0
    narrow = bootstrap_mean([0.0, 10.0], level=0.4)
    assert (narrow.low, narrow.high) == (5.0, 5.0)


def test_three_scenes_by_hand() -> None:
    # 27 draws of (0, 3, 9); sums in order, with how often: 0:1 3:3 6:3 9:1+3 12:6 15:3 18:3 21:3 27:1.
    interval = bootstrap_mean([9.0, 0.0, 3.0], level=0.9)
    assert interval.mean == 4.0
    assert interval.low == pytest.approx(3 / 3)  # 1/27 < 5 % <= 4/27
    assert interval.high == pytest.approx(21 / 3)  # 23/27 < 95 % <= 26/27


def test_enumeration_is_all_draws() -> None:
    values = [1.0, 2.0, 4.0, 8.0, 16.0]
    every = np.sort([sum(draw) / 5 for draw in itertools.product(values, repeat=5)])
    interval = bootstrap_mean(values, level=0.95)
    assert interval.low == pytest.approx(every[math.ceil(0.025 * 5**5) - 1])
    assert interval.high == pytest.approx(every[math.ceil(0.975 * 5**5) - 1])


def test_many_scenes_are_drawn_from_the_seed_and_near_the_normal_interval() -> None:
    values = np.random.default_rng(3).normal(50, 10, 200).tolist()
    interval = bootstrap_mean(values, seed=5)
    assert interval == bootstrap_mean(values, seed=5)
    assert interval != bootstrap_mean(values, seed=6)
    half = 1.96 * np.std(values) / math.sqrt(200)
    assert interval.low == pytest.approx(interval.mean - half, abs=0.1)
    assert interval.high == pytest.approx(interval.mean + half, abs=0.1)


def test_intervals_cover_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    samples = random.exponential(1.0, (300, 60))
    covered = [
        interval.low <= 1.0 <= interval.high
        for interval in (bootstrap_mean(row.tolist(), resamples=600, level=0.9) for row in samples)
    ]
    # 90 % less what the percentile interval lacks on skewed data; three standard errors are 5 %.
    assert 0.83 <= np.mean(covered) <= 0.95


def test_a_paired_difference_by_hand() -> None:
    first = {"a": 10.0, "b": 20.0, "c": 90.0}
    second = {"a": 12.0, "b": 21.0, "d": 0.0}
    # Differences 2 and 1: means 1, 1.5, 2 with probability 1/4, 1/2, 1/4; none at or below zero.
    found = paired_bootstrap(first, second)
    assert (found.mean, found.low, found.high, found.scenes, found.p_value) == (1.5, 1.0, 2.0, 2, 0.0)
    # Differences 2 and -1: means -1, 0.5, 2; a quarter lies at or below zero.
    found = paired_bootstrap(first, {"a": 12.0, "b": 19.0})
    assert (found.mean, found.p_value) == (0.5, 0.5)
    same = paired_bootstrap(first, first)
    assert (same.mean, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_pairing_takes_out_how_hard_a_scene_is() -> None:
    random = np.random.default_rng(1)
    hard = random.normal(50, 20, 100)
    first = {str(i): float(h) for i, h in enumerate(hard)}
    second = {
        str(i): float(h + 2 + e) for i, (h, e) in enumerate(zip(hard, random.normal(0, 1, 100), strict=True))
    }
    paired = paired_bootstrap(first, second)
    apart = bootstrap_mean(list(second.values())), bootstrap_mean(list(first.values()))
    assert paired.low > 1.5
    assert paired.p_value == 0.0
    assert apart[0].low < apart[1].high, "without pairing the intervals overlap"


def test_runs_of_one_scene_are_one_value() -> None:
    values = {("a", 0): 1.0, ("a", 1): 3.0, ("b", 1): 5.0}
    assert mean_over_runs(values) == {"a": 2.0, "b": 5.0}


def test_one_scene_has_no_interval() -> None:
    one = bootstrap_mean([7.0])
    assert (one.mean, one.low, one.high) == (7.0, None, None)
    assert paired_bootstrap({"a": 1.0}, {"a": 3.0}).p_value is None


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_what_has_no_mean(values) -> None:
    with pytest.raises(ValueError, match="bootstrap"):
        bootstrap_mean(values)
    with pytest.raises(ValueError, match="in common"):
        paired_bootstrap({"a": 1.0}, {"b": 1.0})
