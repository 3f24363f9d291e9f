"""Critic and reward model inside the trainer's processes, where NeMo-Aligner has servers to talk to."""

from __future__ import annotations

from collections.abc import Callable

import torch

from her_nemo.aligner.models import micro_batches, token_batches
from her_nemo.config.schema import PpoConfig
from her_nemo.megatron import forward, parallel
from her_nemo.megatron.qwen3 import Model
from her_nemo.rewards.scalar import score_at_last_token
from her_nemo.training.learner import Learner, LossFunction

Sums = dict[str, float]


class SavedWithActor:
    """The answer to `save`: the checkpoint callback writes actor and critic in one."""

    def result(self) -> None:
        """Nothing to wait for."""


class LocalCritic:
    """The client PPOTrainer calls as `rm_critic`.

    Args:
        critic: the value model, which learns.
        reward_model: frozen.
        report: gets the global sums of every critic update of one rollout.
    """

    def __init__(
        self,
        cfg: PpoConfig,
        critic: Learner,
        reward_model: Model,
        objective: LossFunction,
        report: Callable[[list[Sums]], None],
    ) -> None:
        self._critic, self._reward_model = critic, reward_model
        self._objective, self._report = objective, report
        self._size = cfg.model.ppo.forward_micro_batch_size
        self._micro_batch_size = cfg.model.micro_batch_size
        self._share = cfg.model.global_batch_size // parallel.data_size()

    @torch.no_grad()
    def infer_rm_critic(self, rollout_batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(rewards [B], values [B, S-1]): the score at each reply's last token, the value before each token."""
        tokens_BS = rollout_batch["response_tokens"]
        batches = token_batches(tokens_BS, self._size)
        scores_BS = torch.cat(forward.values(self._reward_model, batches))
        values_BS = torch.cat(forward.values(self._critic.model, batches))
        return score_at_last_token(scores_BS, rollout_batch["response_lengths"]), values_BS[:, :-1]

    def train(self, ppo_rollout_data: dict[str, torch.Tensor]) -> None:
        """One pass over this replica's rows, a minibatch of the global batch size at a time (collective)."""
        mask_BT = ppo_rollout_data["mask"].bool()
        rows = {
            "tokens_BS": ppo_rollout_data["response_tokens"],
            "values_BT": ppo_rollout_data["values"],
            "returns_BT": ppo_rollout_data["returns"],
            "mask_BT": mask_BT,
            "scored_B": torch.ones(len(mask_BT), dtype=torch.bool, device=mask_BT.device),
        }
        passes = []
        for minibatch in micro_batches(rows, self._share):
            batches = micro_batches(minibatch, self._micro_batch_size)
            step = self._critic.scheduler.steps + 1
            passes.append(self._critic.update(batches, self._objective, step=step))
        self._report(passes)

    def save(self) -> SavedWithActor:
        """PPOTrainer waits for the result of this before it goes on."""
        return SavedWithActor()
