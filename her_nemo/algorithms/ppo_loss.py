"""The clipped objectives of PPO: Schulman et al., "Proximal policy optimization algorithms" (2017)."""

from __future__ import annotations

import torch
from torch import Tensor

from her_nemo.algorithms.masking import count, masked

Stats = dict[str, Tensor]


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    *,
    entropy: Tensor | None = None,
    entropy_bonus: float = 0.0,
    weights: Tensor | None = None,
    token_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Stats]:
    """The clipped policy loss, summed over the reply tokens.

        ratio_t = exp(log p(t) - log p_old(t))
        loss = - sum_t v_t w_t min(ratio_t A_t, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_t)
               - entropy_bonus * sum_t v_t H_t,    token_count = sum_t v_t

    `clip_low` and `clip_high` apart: Yu et al., "DAPO" (2025).

    Args:
        log_probs: [B, T] under the policy that is trained; carries the gradient.
        old_log_probs, advantages: [B, T] constants of the rollout.
        mask: [B, T] 1 on reply tokens.
        entropy: [B, T] entropy of the policy in nats; needed when `entropy_bonus` is not 0.
        weights: [B, T] importance weights w (importance.py), constants: in the sum, not in the count.
        token_weights: [B, T] weights v of the mean over tokens (masking.weigh_kinds), 1 if not given.

    Returns:
        (loss_sum, token_count, stats). stats has plain sums over the reply tokens: `tokens`, `ratio_sum`,
        `clipped_ratio_sum`, `clip_fraction_sum` (tokens whose gradient the clip took away), `approx_kl_sum`
        (k3 of old to new) and `entropy_sum` where entropy is given.

    Raises:
        ValueError: for an entropy bonus without entropy.
    """
    if entropy_bonus and entropy is None:
        raise ValueError("entropy_bonus is not 0 but no entropy was given: run the forward with entropy")
    # Masked before exp: padding may hold anything.
    log_ratio = masked(log_probs, mask) - masked(old_log_probs.detach(), mask)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    advantage = masked(advantages.detach(), mask)
    plain, bounded = ratio * advantage, clipped * advantage
    objective = torch.minimum(plain, bounded)
    if weights is not None:
        objective = objective * masked(weights.detach(), mask)
    worth = masked(torch.ones_like(objective) if token_weights is None else token_weights.detach(), mask)
    loss = -(objective * worth).sum()
    with torch.no_grad():
        stats = {
            "tokens": count(mask),
            "ratio_sum": masked(ratio, mask).sum(),
            "clipped_ratio_sum": masked(clipped, mask).sum(),
            "clip_fraction_sum": masked((bounded < plain).to(ratio.dtype), mask).sum(),
            "approx_kl_sum": masked(torch.expm1(log_ratio) - log_ratio, mask).sum(),
        }
    if entropy is not None:
        kept = masked(entropy, mask)
        stats["entropy_sum"] = kept.detach().sum()
        if entropy_bonus:
            loss = loss - entropy_bonus * (kept * worth).sum()
    return loss, worth.sum(), stats


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None
) -> tuple[Tensor, Tensor, Stats]:
    """The clipped squared error of the critic, summed over the reply tokens.

        V_clip = V_old + clamp(V - V_old, -clip, clip)
        loss = sum_t max((V - R)^2, (V_clip - R)^2) / 2

    Args:
        values: [B, T] of the critic that is trained; carries the gradient.
        old_values, returns: [B, T] constants of the rollout.
        mask: [B, T] 1 on reply tokens.
        clip: None for the plain squared error.

    Returns:
        (loss_sum, token_count, stats). stats has sums over the reply tokens: `value_sum`, `return_sum`,
        `squared_error_sum` (unclipped) and `clip_fraction_sum` (tokens where the clipped error is the
        larger).
    """
    value = masked(values, mask)
    old = masked(old_values.detach(), mask)
    target = masked(returns.detach(), mask)
    plain = (value - target).square()
    worst = plain
    if clip is not None:
        worst = torch.maximum(plain, (old + (value - old).clamp(-clip, clip) - target).square())
    with torch.no_grad():
        stats = {
            "value_sum": value.sum(),
            "return_sum": target.sum(),
            "squared_error_sum": plain.sum(),
            "clip_fraction_sum": (worst > plain).to(value.dtype).sum(),
        }
    return 0.5 * worst.sum(), count(mask), stats
