"""PPO's two losses as its configuration says (algorithms/ppo_loss.py has the formulas)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from her_nemo.algorithms import kl
from her_nemo.algorithms.masking import weigh_kinds
from her_nemo.algorithms.ppo_loss import aggregate, policy_loss, value_loss
from her_nemo.config.schema import PpoConfig
from her_nemo.data.tokenise import KIND_NAMES
from her_nemo.megatron.forward import TokenOutputs
from her_nemo.rollout.invariants import check_unmoved_ratio
from her_nemo.training.learner import LossFunction, MicroBatch
from her_nemo.training.loop import kind_weights
from her_nemo.training.run import Run

Loss = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def policy_objective(cfg: PpoConfig, kl_coefficient: float) -> LossFunction:
    """The clipped policy loss, weighted by segment kind, and the plain sums of each kind for the log.

    `kl_coefficient`: of the KL penalty, which is part of this loss where trainer.ppo.kl.placement is loss.
    """
    ppo, penalty = cfg.model.ppo, cfg.trainer.ppo.kl
    clips = ppo.ratio_eps, ppo.ratio_eps if ppo.ratio_eps_high is None else ppo.ratio_eps_high
    shape = {"dual_clip": ppo.dual_clip, "sequence_ratio": ppo.ratio_level == "sequence"}
    weights_K = kind_weights(cfg.model.data.layer_weights)
    longest = float(ppo.length_params.max_length)

    def objective(outputs: TokenOutputs, batch: MicroBatch) -> Loss:
        assert outputs.log_probs_BT is not None
        log_probs_BT, constants = outputs.log_probs_BT, (batch["old_log_probs_BT"], batch["advantages_BT"])
        mask_BT, kinds_BT = _learned(batch), batch["kinds_BT"]
        weights_BT, replies = aggregate(
            mask_BT, weigh_kinds(mask_BT, kinds_BT, weights_K), ppo.loss_aggregation, longest
        )
        in_loss = None
        if penalty.placement == "loss":
            in_loss = kl.estimate(penalty.estimator, log_probs_BT, batch["ref_log_probs_BT"], mask_BT)
        loss_sum, tokens, sums = policy_loss(
            log_probs_BT,
            *constants,
            mask_BT,
            *clips,
            entropy=outputs.entropy_BT,
            entropy_bonus=ppo.entropy_bonus,
            weights=batch.get("importance_BT"),
            token_weights=weights_BT,
            kl=in_loss,
            kl_coefficient=kl_coefficient if in_loss is not None else 0.0,
            **shape,
        )
        for kind, name in KIND_NAMES.items():
            here = mask_BT & (kinds_BT == kind)
            sums[f"{name}_loss"], sums[f"{name}_tokens"], _ = policy_loss(
                log_probs_BT.detach(), *constants, here, *clips, **shape
            )
        return loss_sum, tokens if replies is None else replies, sums

    return objective


def value_objective(cfg: PpoConfig) -> LossFunction:
    clip = cfg.critic.loss_clip_val or None

    def objective(outputs: TokenOutputs, batch: MicroBatch) -> Loss:
        assert outputs.values_BS is not None
        return value_loss(
            outputs.values_BS[:, :-1], batch["values_BT"], batch["returns_BT"], _learned(batch), clip
        )

    return objective


def unmoved(here: Run, step: int, cfg: PpoConfig) -> Callable[[dict[str, float]], None]:
    """Check of the first minibatch after a rollout: the policy has not moved, so its ratio is 1."""

    def check(sums: dict[str, float]) -> None:
        if not sums["tokens"]:
            return  # no reply of this minibatch has a score
        ratio = check_unmoved_ratio(sums["ratio_sum"] / sums["tokens"], step, cfg.trainer.precision)
        here.summary.setdefault("ratio_step0", ratio)

    return check


def _learned(batch: MicroBatch) -> torch.Tensor:
    """[B, T] the reply tokens that count: none of a reply without a score (rollout/experience.py: learned_BT)."""
    return batch["mask_BT"] & batch["scored_B"].unsqueeze(1)
