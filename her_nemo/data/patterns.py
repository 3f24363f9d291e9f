"""How varied a set of replies is built: the distribution of patterns, a pattern being the order of segment kinds."""

from __future__ import annotations

import math
from collections import Counter


def entropy_bits(counts: Counter[str]) -> float:
    """Shannon entropy of the distribution that `counts` describe, in bits."""
    total = sum(counts.values())
    # The sum can come out as -0.0.
    return abs(sum(n / total * math.log2(n / total) for n in counts.values()))
