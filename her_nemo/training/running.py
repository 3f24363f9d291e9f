"""Numbers that a run carries from step to step beside its weights, saved with it so that it resumes bit for bit.

Plain floats of double precision: JSON writes and reads them exactly. Every rank holds the same.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from her_nemo.algorithms.kl import adapted


@dataclass
class RunningMoments:
    """Mean and variance of all that was ever seen, batch after batch (Chan, Golub and LeVeque 1983)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances to the mean

    def update(self, total: float, squares: float, count: float) -> None:
        """Take in a batch by its sum, its sum of squares and how many it holds (advantages.masked_moments)."""
        if count == 0:
            return
        batch_mean = total / count
        batch_squares = max(0.0, squares - total * batch_mean)
        away = batch_mean - self.mean
        both = self.count + count
        self.squares += batch_squares + away * away * self.count * count / both
        self.mean += away * count / both
        self.count = both

    @property
    def deviation(self) -> float:
        """Standard deviation of the population seen so far; 0 before anything was seen."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]


@dataclass
class KlController:
    """The coefficient of the KL penalty: fixed, or led towards `target` nats a reply (algorithms/kl.py: adapted)."""

    coefficient: float
    target: float | None = None
    horizon: float = 10_000.0

    def update(self, kl: float, samples: int) -> None:
        """After a rollout of `samples` replies with this mean KL (nats a reply)."""
        if self.target is not None:
            self.coefficient = adapted(
                self.coefficient, kl, target=self.target, horizon=self.horizon, samples=samples
            )

    def state_dict(self) -> dict[str, Any]:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A fixed coefficient stays what the configuration says."""
        if self.target is not None:
            self.coefficient = state["coefficient"]
