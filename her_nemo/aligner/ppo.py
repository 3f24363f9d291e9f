"""PPO under NeMo-Aligner's PPOTrainer: its loop, rewards, advantages and minibatches; our models, engine and losses.

Steps are numbered as in our own loop: rollouts from 1, those of the critic's warm-up included. What is drawn for a
prompt depends on seed, step and place in the rollout under both backends, so they can be compared number by number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf

from her_nemo.aligner import compat
from her_nemo.aligner.compat import EpochSampler
from her_nemo.aligner.critic import LocalCritic
from her_nemo.aligner.glue import Checkpoints, Clock
from her_nemo.aligner.models import ActorModel, AlignableOptimizer, PromptBatch
from her_nemo.config.schema import PpoConfig
from her_nemo.data.loaders import GlobalBatchSampler
from her_nemo.data.tokenise import Prompt, Tokeniser
from her_nemo.megatron import parallel
from her_nemo.megatron.qwen3 import Model
from her_nemo.rollout.experience import Experience
from her_nemo.rollout.invariants import check_rollout_gap, check_unmoved_kl
from her_nemo.training.learner import Learner, LossFunction, global_sums
from her_nemo.training.run import Run

if TYPE_CHECKING:
    import pandas

Sums = dict[str, float]


@dataclass(frozen=True)
class Stage:
    """What the PPO stage hands over: its models, its data, and the functions of its own loop."""

    actor: Learner
    critic: Learner
    reference: Model
    reward_model: Model
    prompts: Sequence[Prompt]
    held_out: Sequence[Prompt]
    tokeniser: Tokeniser
    generate: Callable[[Sequence[Prompt], int], Experience]
    """(prompts of a whole rollout, step that seeds it) -> this replica's share."""
    policy_objective: LossFunction
    value_objective: LossFunction
    on_unmoved: Callable[[Sums, int], None]
    """(sums of the first minibatch after a rollout, step) -> checks that the ratio is 1."""
    actor_tags: Callable[[list[Sums]], Sums]
    critic_tags: Callable[[list[Sums]], Sums]
    summarise: Callable[[dict[str, Any], Sums, float], None]


class RolloutSampler(EpochSampler):
    """Row numbers of the next rollout of each PPO step, as PPOTrainer's dataloaders have them."""

    def __init__(self, rows: Sequence[int], total: int, rollout: int) -> None:
        # A replica's share is one micro-batch to the trainer; the engine cuts it as it needs.
        super().__init__(total, rollout, micro_batch_size=rollout // parallel.data_size())
        self._rows = rows

    def __iter__(self) -> Iterator[Sequence[int]]:
        yield self._rows


@dataclass(frozen=True)
class RolloutLoader:
    """A dataloader to PPOTrainer: a sampler, and what it samples from."""

    batch_sampler: RolloutSampler
    dataset: Sequence[Prompt]


class RolloutLog:
    """NeMo-Aligner's logger. `step` counts rollouts; the minibatches of one step become one row of metrics."""

    def __init__(self, here: Run, stage: Stage, optimizer: AlignableOptimizer, done: int) -> None:
        self._here, self._stage, self._optimizer = here, stage, optimizer
        self._passes: list[Sums] = []
        self.step = done

    def log_metrics(self, metrics: dict[str, Any], step: int, prefix: str) -> None:
        """Record what the trainer reports. Its own count of steps leaves the warm-up out; ours does not."""
        if prefix == "train_optim/":
            self._passes.append({**metrics, "grad_norm": self._optimizer.grad_norm})
            return
        if prefix == "train_rollouts/":
            self.step += 1
            self._here.summary["steps"] = self.step
        elif prefix == "timers/":
            self._here.metrics.log(self.step, self._stage.actor_tags(self._passes))
            self._passes = []
        elif prefix == "val_rollouts/":
            self._here.summary["val_reward"] = metrics["rewards"]
        self._here.metrics.log(self.step, {prefix + name: float(value) for name, value in metrics.items()})

    def log_critic(self, passes: list[Sums]) -> None:
        """The critic's updates, which come before their rollout is logged."""
        self._here.metrics.log(self.step + 1, self._stage.critic_tags(passes))

    def log_table(self, key: str, dataframe: pandas.DataFrame, step: int) -> None:
        """The last row's reply, as text."""
        self._here.metrics.text(self.step, key, str(dataframe.iloc[-1]["response"]))

    def finalize(self) -> None:
        """The run closes its files itself."""


class WholeRollout:
    """NeMo-Aligner's batch iterator: one batch, from which our engine takes this replica's share."""

    def __init__(
        self,
        sampler_iter: Iterator[Sequence[int]],
        num_microbatches: int,
        dataset: Sequence[Prompt],
        collate_fn: Callable[[list[Prompt]], PromptBatch],
    ) -> None:
        self._rows, self._dataset, self._collate = next(sampler_iter), dataset, collate_fn

    def __iter__(self) -> Iterator[PromptBatch]:
        yield self._collate([self._dataset[int(row)] for row in self._rows])


def fit(here: Run, cfg: PpoConfig, stage: Stage, order: GlobalBatchSampler, *, done: int) -> None:
    """Train from step `done` on to the end, or to where the run is told to stop (collective)."""
    compat.install()
    actor = ActorModel(
        stage.actor,
        cfg.model,
        stage.reference,
        stage.tokeniser,
        generate=stage.generate,
        objective=stage.policy_objective,
        on_unmoved=lambda sums: stage.on_unmoved(sums, log.step),
    )
    log = RolloutLog(here, stage, actor.optimizer, done)
    drawing = {"step": 0}  # 0 while the trainer validates

    def training_rollout(consumed_samples: int) -> RolloutLoader:
        epoch, place = divmod(consumed_samples // order.global_batch_size, len(order))
        rows = order.order(epoch)[place * order.global_batch_size :][: order.global_batch_size]
        drawing["step"] = log.step + 1
        return RolloutLoader(RolloutSampler(rows, order.n, order.global_batch_size), stage.prompts)

    def validation_rollout(consumed_samples: int) -> RolloutLoader:
        rows = range(len(stage.held_out) - len(stage.held_out) % parallel.data_size())
        drawing["step"] = 0
        return RolloutLoader(RolloutSampler(rows, len(rows), len(rows)), stage.held_out)

    def saved_step() -> int:
        # Where a resumed run goes on in the data: PPOTrainer gives the prompts of the warm-up out again.
        order.epoch, order.position = divmod(trainer.consumed_samples // order.global_batch_size, len(order))
        return log.step

    trainer = _trainer_class(here, cfg, stage, log)(
        cfg=_trainer_config(cfg, steps_per_epoch=len(order), done=done, validates=bool(stage.held_out)),
        model=actor,
        optimizer=actor.optimizer,
        scheduler=stage.actor.scheduler,
        train_dataloader_builder=training_rollout,
        val_dataloader_builder=validation_rollout,
        collate_fn=lambda prompts: PromptBatch(prompts, drawing["step"]),
        rm_critic=LocalCritic(cfg, stage.critic, stage.reward_model, stage.value_objective, log.log_critic),
        batch_iterator_cls=WholeRollout,
        logger=log,
        ckpt_callback=Checkpoints(here, saved_step),
        run_timer=Clock(here.stop),
    )
    trainer.step = max(0, done - cfg.trainer.ppo.critic_warmup_steps)
    trainer.consumed_samples = (order.epoch * len(order) + order.position) * order.global_batch_size
    trainer.ppo_optimization_step = stage.actor.scheduler.steps
    trainer.fit()


def _trainer_config(cfg: PpoConfig, *, steps_per_epoch: int, done: int, validates: bool) -> DictConfig:
    """Our keys under the names that PPOTrainer reads. Its max_epochs counts passes over the prompts."""
    ppo = cfg.trainer.ppo
    return OmegaConf.create(
        {
            "max_epochs": -(-ppo.max_steps // steps_per_epoch),
            "max_steps": ppo.max_steps,
            "critic_warmup_steps": max(0, ppo.critic_warmup_steps - done),
            "val_check_interval": ppo.val_check_interval if validates else 0,
            "save_interval": ppo.save_interval,
            "gradient_clip_val": ppo.gradient_clip_val,
            "initial_policy_kl_penalty": ppo.initial_policy_kl_penalty,
            "use_absolute_kl": False,
            "discount_factor": ppo.discount_factor,
            "gae_lambda": ppo.gae_lambda,
            "normalize_advantages": ppo.whitens,
            "rollout_batch_seq_length": ppo.rollout_batch_seq_length,
            "model_gbs": cfg.model.global_batch_size,
            "model_mbs": cfg.model.micro_batch_size,
        }
    )


def _trainer_class(here: Run, cfg: PpoConfig, stage: Stage, log: RolloutLog) -> type:
    """PPOTrainer with our checks of a rollout, and with the segment kinds of its tokens passed on to the loss."""
    from nemo_aligner.algorithms.ppo import PPOTrainer

    class CheckedTrainer(PPOTrainer):
        def generate_ppo_data(self, rollout_batch: Any) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
            data, metrics = super().generate_ppo_data(rollout_batch)
            data["kinds"] = rollout_batch["kinds"]
            gap, sums = _examine(rollout_batch, data["mask"].bool(), stage.tokeniser, log.step + 1, cfg)
            if log.step < cfg.trainer.ppo.critic_warmup_steps:
                check_unmoved_kl(sums["init_policy_kl"] / sums["tokens"], cfg.trainer.precision)
            stage.summarise(here.summary, sums, gap)
            here.metrics.log(log.step + 1, {"rollout/logprob_gap_max": gap})
            return data, metrics

    return CheckedTrainer


def _examine(
    rollout: Any, mask_BT: torch.Tensor, tokeniser: Tokeniser, step: int, cfg: PpoConfig
) -> tuple[float, Sums]:
    """(largest gap between engine and trainer, global sums of reward and KL) of one rollout (collective)."""
    lengths_B = rollout["response_lengths"]
    experience = Experience(
        rollout["response_tokens"],
        lengths_B,
        rollout["prompt_lengths"],
        mask_BT,
        rollout["kinds"],
        rollout["rollout_logprobs"],
        rollout["is_end"].bool(),
        torch.zeros_like(lengths_B),
        torch.ones_like(lengths_B, dtype=torch.bool),
    )
    experience.old_log_probs_BT = rollout["logprobs"]
    gap = check_rollout_gap(experience, tokeniser, step, cfg.trainer.precision)
    reference = rollout["init_logprobs"] if "init_logprobs" in rollout else rollout["logprobs"]
    kl_BT = torch.where(mask_BT, rollout["logprobs"] - reference, 0.0)
    samples = torch.tensor(float(len(experience)), device=mask_BT.device)
    rows = {
        "samples": samples,
        "scored": samples,
        "rewards": rollout["rewards"].sum(),
        "tokens": mask_BT.sum(),
        "init_policy_kl": kl_BT.sum(),
    }
    return gap, global_sums([rows])
