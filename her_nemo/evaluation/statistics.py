"""Means with their uncertainty. No score is reported without it."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


def mean_and_standard_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard error of the mean: s / sqrt(n) with s over n - 1. One value has an error of nan.

    Raises:
        ValueError: no values.
    """
    count = len(values)
    if not count:
        raise ValueError("mean of no values")
    mean = math.fsum(values) / count
    if count == 1:
        return mean, math.nan
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, math.sqrt(variance / count)


def paired_difference(first: Mapping[str, float], second: Mapping[str, float]) -> tuple[float, float]:
    """Mean and standard error of second - first over the keys that both have.

    Pairing by scene takes out how hard a scene is, which both models share.

    Raises:
        ValueError: no key in common.
    """
    shared = sorted(first.keys() & second.keys())
    if not shared:
        raise ValueError("paired difference: no key in common")
    return mean_and_standard_error([second[key] - first[key] for key in shared])


# ---------------------------------------------------------------- bootstrap over scenes

EXACT_UP_TO = 7  # scenes: C(13, 7) = 1,716 different resamples are enumerated rather than drawn
_CHUNK = 2**22  # indices drawn at a time


@dataclass(frozen=True)
class Interval:
    """A mean over scenes with its confidence interval. One scene has no interval: low = high = None."""

    mean: float
    low: float | None
    high: float | None
    level: float
    scenes: int


@dataclass(frozen=True)
class Difference:
    """Mean of second - first over shared scenes.

    `p_value` is two-sided: twice the smaller share of resamples on either side of zero (those at zero count on
    both), at most 1; None for one scene.
    """

    mean: float
    low: float | None
    high: float | None
    level: float
    scenes: int
    p_value: float | None


def bootstrap_mean(
    values: Sequence[float], *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile bootstrap of the mean (Efron 1979): values are drawn with replacement, one a scene.

    A scene played several times comes in as its mean over the runs: scenes are what is drawn, so that runs of the
    same scene are not taken for independent ones. Up to EXACT_UP_TO values every resample is enumerated with its
    probability and nothing is random.

    Raises:
        ValueError: no values, a value that is not finite, or a level outside (0, 1).
    """
    means, weights = _resampled_means(values, resamples, seed)
    low, high = _bounds(means, weights, level) if len(values) > 1 else (None, None)
    return Interval(math.fsum(values) / len(values), low, high, level, len(values))


def paired_bootstrap(
    first: Mapping[str, float],
    second: Mapping[str, float],
    *,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Bootstrap of second - first over the scenes that both have: scenes are drawn, each with both its values.

    Raises:
        ValueError: no scene in common, or as `bootstrap_mean`.
    """
    shared = sorted(first.keys() & second.keys())
    if not shared:
        raise ValueError("paired bootstrap: no scene in common")
    differences = [second[key] - first[key] for key in shared]
    means, weights = _resampled_means(differences, resamples, seed)
    mean = math.fsum(differences) / len(differences)
    if len(differences) == 1:
        return Difference(mean, None, None, level, 1, None)
    low, high = _bounds(means, weights, level)
    smaller = min(float(weights[means <= 0].sum()), float(weights[means >= 0].sum()))
    return Difference(mean, low, high, level, len(differences), min(1.0, 2.0 * smaller))


def mean_over_runs(values: Mapping[tuple[str, int], float]) -> dict[str, float]:
    """Scene -> mean over the runs that have a value, from (scene, run) -> value."""
    by_scene: dict[str, list[float]] = {}
    for (scene, _), value in sorted(values.items()):
        by_scene.setdefault(scene, []).append(value)
    return {scene: math.fsum(found) / len(found) for scene, found in by_scene.items()}


def _resampled_means(values: Sequence[float], resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(means of resamples in rising order, their probabilities)."""
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        raise ValueError("bootstrap of no values")
    if not np.isfinite(array).all():
        raise ValueError("bootstrap: a value is not finite")
    count = len(array)
    if count <= EXACT_UP_TO:
        picks = list(itertools.combinations_with_replacement(range(count), count))
        means = array[np.array(picks)].mean(axis=1)
        # A multiset stands for n! / (k1! k2! ...) of the n^n equally likely draws.
        ways = [
            math.factorial(count) // math.prod(math.factorial(k) for k in Counter(pick).values())
            for pick in picks
        ]
        weights = np.array(ways, dtype=np.float64) / count**count
    else:
        random = np.random.default_rng(seed)
        rows = max(1, _CHUNK // count)
        parts = [
            array[random.integers(0, count, (min(rows, resamples - begin), count))].mean(axis=1)
            for begin in range(0, resamples, rows)
        ]
        means = np.concatenate(parts)
        weights = np.full(len(means), 1.0 / len(means))
    order = np.argsort(means, kind="stable")
    return means[order], weights[order]


def _bounds(means: np.ndarray, weights: np.ndarray, level: float) -> tuple[float, float]:
    """The smallest means that hold (1 - level) / 2 and (1 + level) / 2 of the probability."""
    if not 0.0 < level < 1.0:
        raise ValueError(f"level {level} is not between 0 and 1")
    reached = np.cumsum(weights)
    # A hair less, so that rounding of the sum does not skip the value that reaches a bound exactly.
    low, high = (int(np.searchsorted(reached, share - 1e-12)) for share in ((1 - level) / 2, (1 + level) / 2))
    return float(means[low]), float(means[min(high, len(means) - 1)])
