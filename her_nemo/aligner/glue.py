"""What NeMo-Aligner's trainers ask of their surroundings, answered by our run: data, clock and checkpoints.

Data order, run directory, resume and stop signals are thus the same under both backends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from numpy.typing import NDArray

from her_nemo.aligner.compat import EpochSampler
from her_nemo.data.loaders import GlobalBatchSampler
from her_nemo.training.learner import MicroBatch
from her_nemo.training.run import Run
from her_nemo.training.signals import GracefulStop


class StepLoader:
    """The training data as SupervisedTrainer iterates over it: each item is one step's micro-batches on this replica.

    An iteration goes on to the end of the current epoch of `order`.
    """

    def __init__(self, order: GlobalBatchSampler, batches: Callable[[NDArray], list[MicroBatch]]) -> None:
        self.batch_sampler = EpochSampler(order.n, order.global_batch_size, micro_batch_size=1)
        self._order, self._batches = order, batches

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        for indices in self._order:
            yield self._batches(indices)


class Clock:
    """NeMo-Aligner's run timer: time is up when our run is asked to stop, by a signal or by max_time_per_run."""

    def __init__(self, stop: GracefulStop) -> None:
        self._stop = stop

    def start_time(self) -> None:
        """Nothing to start: our limit counts from the start of the job."""

    def is_finished(self) -> bool:
        """The same answer on every rank (collective)."""
        return self._stop.requested()


class Checkpoints:
    """NeMo-Aligner's checkpoint callback: our checkpoint of the step that `step()` names."""

    def __init__(self, here: Run, step: Callable[[], int]) -> None:
        self._here, self._step = here, step

    def custom_save(self, monitor_candidates: dict[str, Any], is_train_end: bool = False) -> None:
        """Save (collective). Which ones are kept is exp_manager's: the newest, not the best by a monitored value."""
        self._here.save(self._step())
