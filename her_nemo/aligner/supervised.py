"""SFT and the reward model under NeMo-Aligner's SupervisedTrainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

from her_nemo.aligner import compat
from her_nemo.aligner.glue import Checkpoints, Clock, StepLoader
from her_nemo.aligner.models import AlignableOptimizer, SupervisedModel
from her_nemo.config.sections import Loop
from her_nemo.data.loaders import GlobalBatchSampler
from her_nemo.data.tokenise import Tokeniser
from her_nemo.training.learner import Learner, LossFunction, MicroBatch
from her_nemo.training.loop import Rows, my_micro_batches, validation_micro_batches
from her_nemo.training.run import Run

Sums = dict[str, float]


@dataclass(frozen=True)
class Stage:
    """What SFT and the reward model differ in."""

    objective: LossFunction
    tags: Callable[[str, Sums], Sums]
    """("train" or "val", global sums) -> TensorBoard tags."""
    figures: Callable[[str, Sums], dict[str, Any]]
    """The same -> entries of summary.json."""


class StepLog:
    """NeMo-Aligner's logger: our tags, our step numbers, our files."""

    def __init__(self, here: Run, stage: Stage, optimizer: AlignableOptimizer) -> None:
        self._here, self._stage, self._optimizer = here, stage, optimizer
        self.step = 0

    def log_metrics(self, metrics: Sums, step: int, prefix: str) -> None:
        """Record one step or one validation. SupervisedTrainer counts training steps from 0, validations from 1."""
        split = prefix.rstrip("/")
        tags = self._stage.tags(split, metrics)
        if split == "train":
            self.step, seconds = step + 1, metrics["step_time"]
            tags |= {"train/grad_norm": self._optimizer.grad_norm, "train/lr": metrics["lr"]}
            tags |= {"timers/step": seconds, "performance/tokens_per_second": self._here.tokens / seconds}
            self._here.tokens = 0
            self._here.summary["steps"] = self.step
        self._here.metrics.log(self.step, tags)
        self._here.summary |= self._stage.figures(split, metrics)

    def finalize(self) -> None:
        """The run closes its files itself."""


def fit(
    here: Run,
    learner: Learner,
    order: GlobalBatchSampler,
    loop: Loop,
    stage: Stage,
    *,
    train: Rows,
    valid: Rows,
    tokeniser: Tokeniser,
    done: int,
) -> None:
    """Train from step `done` on to the end, or to where the run is told to stop (collective)."""
    compat.install()
    from nemo_aligner.algorithms.supervised import SupervisedTrainer

    cfg = here.cfg.model

    def batches(indices: NDArray[np.int64]) -> list[MicroBatch]:
        made = my_micro_batches(train, indices, cfg, tokeniser)
        here.tokens += sum(_tokens(train[int(index)]) for index in indices)
        return made

    model = SupervisedModel(learner, cfg, stage.objective)
    log = StepLog(here, stage, model.optimizer)
    log.step = done
    # One item that holds every validation batch: SupervisedTrainer averages items, which would weigh tokens unevenly.
    held_out = [validation_micro_batches(valid, cfg, loop, tokeniser)] if valid else []
    trainer = SupervisedTrainer(
        cfg=OmegaConf.create(
            {
                "max_epochs": loop.max_epochs,
                "max_steps": loop.max_steps,
                "val_check_interval": loop.val_check_interval,
                "save_interval": loop.save_interval,
                "limit_train_batches": 1.0,
                "limit_val_batches": 1.0 if valid else 0,
                "gradient_clip_val": loop.gradient_clip_val,
            }
        ),
        model=model,
        optimizer=model.optimizer,
        scheduler=learner.scheduler,
        train_dataloader=StepLoader(order, batches),
        val_dataloader=held_out,
        test_dataloader=None,
        logger=log,
        ckpt_callback=Checkpoints(here, lambda: log.step),
        run_timer=Clock(here.stop),
    )
    # Not its load_state_dict, which compares the counts of all ranks in float32.
    trainer.step, trainer.consumed_samples = done, done * cfg.global_batch_size
    trainer.fit()


def _tokens(row: Any) -> int:
    """Tokens of a sample, or of both replies of a pair."""
    return sum(len(sample) for sample in row) if isinstance(row, tuple) else len(row)
