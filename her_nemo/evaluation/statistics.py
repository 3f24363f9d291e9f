"""Means with their uncertainty. No score is reported without it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


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
