"""Estimators of KL(policy || reference) from the sampled tokens, and the reward with the KL penalty in it.

For x sampled from the policy, with r = p_ref(x) / p(x):
    k1 = -log r                 unbiased, high variance, may be negative
    k2 = (log r)^2 / 2          biased, low variance, never negative
    k3 = (r - 1) - log r        unbiased, low variance, never negative
John Schulman, "Approximating KL divergence" (2020), http://joschu.net/blog/kl-approx.html
"""

from __future__ import annotations

import torch
from torch import Tensor

from her_nemo.algorithms.masking import masked, wide


def k1(log_probs_BT: Tensor, ref_log_probs_BT: Tensor) -> Tensor:
    """[B, T] log p - log p_ref. No mask: garbage in padding stays garbage there."""
    return wide(log_probs_BT) - wide(ref_log_probs_BT)


def k2(log_probs_BT: Tensor, ref_log_probs_BT: Tensor) -> Tensor:
    """[B, T] half the squared log-ratio."""
    return 0.5 * k1(log_probs_BT, ref_log_probs_BT).square()


def k3(log_probs_BT: Tensor, ref_log_probs_BT: Tensor) -> Tensor:
    """[B, T] r - 1 - log r with r = p_ref / p. Written with expm1: exact near r = 1."""
    log_ratio = -k1(log_probs_BT, ref_log_probs_BT)
    return torch.expm1(log_ratio) - log_ratio


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def estimate(name: str, log_probs_BT: Tensor, ref_log_probs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """[B, T] estimator `name` with its gradient, 0 under the mask: the KL term of a loss.

    In a loss the gradient counts, not the value: k2's and k3's pull the policy towards the reference, k1's is that of
    log p, whose expectation is 0 and which pulls nowhere.
    """
    return ESTIMATORS[name](masked(log_probs_BT, mask_BT), masked(ref_log_probs_BT.detach(), mask_BT))


def adapted(coefficient: float, kl: float, *, target: float, horizon: float, samples: int) -> float:
    """The penalty's coefficient after a rollout of `samples` replies whose mean KL was `kl`.

        beta <- beta (1 + clip(kl / target - 1, -0.2, 0.2) * samples / horizon)

    Ziegler et al. 2019, section 2.2.

    Args:
        coefficient: beta.
        kl, target: nats per reply.
        horizon: replies over which a constant error of 0.2 changes beta by a factor of about e^0.2.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coefficient * (1.0 + error * samples / horizon)


@torch.no_grad()
def rewards_with_kl(scores_B: Tensor, kl_BT: Tensor, mask_BT: Tensor, coefficient: float) -> Tensor:
    """Reward per token: the penalty on every reply token, the score on the last one.

        r_t = - coefficient * kl_t + [t is the last token of the reply] * score

    Ziegler et al., "Fine-tuning language models from human preferences" (2019).

    Args:
        scores_B: [B] score of each whole reply.
        kl_BT: [B, T] KL estimate of each token.
        mask_BT: [B, T] 1 on reply tokens.

    Returns:
        rewards_BT, 0 under the mask.

    Raises:
        ValueError: if a row has no reply token, so that its score has no place.
    """
    on = mask_BT != 0
    empty = (~on.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"no reply token in rows {empty[:8]} of the batch: their score cannot be placed")
    rewards = -coefficient * masked(kl_BT, mask_BT)
    positions = torch.arange(on.shape[1], device=on.device)
    last = torch.where(on, positions, -1).amax(dim=1, keepdim=True)
    return rewards.scatter_add(1, last, wide(scores_B).to(rewards.dtype).unsqueeze(1))
