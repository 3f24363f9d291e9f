"""Advantages: how much better a token was than the critic expected."""

from __future__ import annotations

import torch
from torch import Tensor

from her_nemo.algorithms.masking import masked


@torch.no_grad()
def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, discount: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation.

        delta_t = r_t + discount * V_next(t) - V_t
        A_t = delta_t + discount * lambda * A_next(t),    return_t = A_t + V_t

    next(t) is the next token with mask 1; after the last one V and A are 0 (the episode ends). Tokens under
    a 0 are stepped over, so a mask with holes (turns of others between two turns of the policy) is one
    episode. Schulman et al., "High-dimensional continuous control using generalized advantage estimation"
    (2016).

    Args:
        rewards_BT: [B, T] reward of the token predicted at t.
        values_BT: [B, T] the critic's value before that token.
        mask_BT: [B, T] 1 on the policy's tokens.
        discount, gae_lambda: in [0, 1].

    Returns:
        (advantages_BT, returns_BT), 0 under the mask, without gradient.
    """
    rewards, values = masked(rewards_BT, mask_BT), masked(values_BT, mask_BT)
    on = mask_BT != 0
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(next_value)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + discount * next_value - values[:, t]
        advantage = delta + discount * gae_lambda * next_advantage
        next_advantage = torch.where(on[:, t], advantage, next_advantage)
        next_value = torch.where(on[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(on[:, t], advantage, advantages[:, t])
    return advantages, masked(advantages + values, mask_BT)


@torch.no_grad()
def masked_moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(sum, sum of squares, count) of the unmasked entries, in float64.

    All three add up over ranks: all-reduce them, then `mean_and_variance`. float64 because the variance is a
    difference of two numbers that may be large and close.
    """
    kept = masked(x, mask).double()
    return kept.sum(), kept.square().sum(), (mask != 0).sum().double()


def mean_and_variance(total: Tensor, squares: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance from `masked_moments`. Both are 0 when the count is 0."""
    at_least_one = count.clamp(min=1.0)
    mean = total / at_least_one
    return mean, (squares / at_least_one - mean.square()).clamp(min=0.0)


def whiten(x: Tensor, mask: Tensor, mean: Tensor, variance: Tensor, epsilon: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) where the mask is 1, else 0.

    With the mean and variance of the whole global batch the result does not depend on how it is spread over
    ranks and micro batches.
    """
    kept = masked(x, mask)
    scale = torch.rsqrt(variance.double() + epsilon)
    return masked(((kept.double() - mean.double()) * scale).to(kept.dtype), mask)


def masked_whiten(x: Tensor, mask: Tensor, epsilon: float = 1e-8) -> Tensor:
    """`whiten` with the moments of `x` itself: for a single process."""
    mean, variance = mean_and_variance(*masked_moments(x, mask))
    return whiten(x, mask, mean, variance, epsilon)
