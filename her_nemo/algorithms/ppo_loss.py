"""The clipped objectives of PPO: Schulman et al., "Proximal policy optimization algorithms" (2017)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from her_nemo.algorithms.masking import count, masked

Stats = dict[str, Tensor]
Aggregation = Literal["token_mean", "sequence_mean", "constant"]


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
    dual_clip: float | None = None,
    sequence_ratio: bool = False,
    kl: Tensor | None = None,
    kl_coefficient: float = 0.0,
) -> tuple[Tensor, Tensor, Stats]:
    """The clipped policy loss, summed over the reply tokens.

        ratio_t = exp(log p(t) - log p_old(t))
        J_t = min(ratio_t A_t, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_t)
        loss = - sum_t v_t (w_t J_t + entropy_bonus H_t - kl_coefficient KL_t),    token_count = sum_t v_t

    `clip_low` and `clip_high` apart: Yu et al., "DAPO" (2025, arXiv 2503.14476). With `dual_clip` c > 1, where A_t is
    negative J_t is no less than c A_t: Ye et al. (2020, arXiv 1912.09729), "Mastering complex control in MOBA games".
    With `sequence_ratio`, all tokens of a reply share the geometric mean of their ratios,
    exp(sum_t v_t log ratio_t / sum_t v_t), gradient included: Zheng et al., "Group sequence policy optimization"
    (2025, arXiv 2507.18071), whose clip range is some hundred times narrower (3e-4).

    Args:
        log_probs: [B, T] under the policy that is trained; carries the gradient.
        old_log_probs, advantages: [B, T] constants of the rollout.
        mask: [B, T] 1 on reply tokens.
        entropy: [B, T] entropy of the policy in nats; needed when `entropy_bonus` is not 0.
        weights: [B, T] importance weights w (importance.py), constants: in the sum, not in the count.
        token_weights: [B, T] weights v of the mean over tokens (masking.weigh_kinds, `aggregate`), 1 if not given.
        kl: [B, T] KL to the reference, with gradient (kl.estimate); needed when `kl_coefficient` is not 0.

    Returns:
        (loss_sum, token_count, stats). stats has plain sums over the reply tokens: `tokens`, `ratio_sum`,
        `clipped_ratio_sum`, `clip_fraction_sum` (tokens whose gradient the clip took away), `approx_kl_sum`
        (k3 of old to new), and where given `dual_clip_sum` (tokens at the lower bound), `entropy_sum`, `loss_kl_sum`.

    Raises:
        ValueError: for an entropy bonus without entropy, a KL coefficient without KL, a dual clip of 1 or less.
    """
    if entropy_bonus and entropy is None:
        raise ValueError("entropy_bonus is not 0 but no entropy was given: run the forward with entropy")
    if kl_coefficient and kl is None:
        raise ValueError("kl_coefficient is not 0 but no KL was given")
    # Masked before exp: padding may hold anything.
    log_ratio = masked(log_probs, mask) - masked(old_log_probs.detach(), mask)
    worth = masked(torch.ones_like(log_ratio) if token_weights is None else token_weights.detach(), mask)
    ratio = (_row_mean(log_ratio, worth, mask) if sequence_ratio else log_ratio).exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    advantage = masked(advantages.detach(), mask)
    plain, bounded = ratio * advantage, clipped * advantage
    objective = torch.minimum(plain, bounded)
    with torch.no_grad():
        stats = {
            "tokens": count(mask),
            "ratio_sum": masked(ratio, mask).sum(),
            "clipped_ratio_sum": masked(clipped, mask).sum(),
            "clip_fraction_sum": masked((bounded < plain).to(ratio.dtype), mask).sum(),
            "approx_kl_sum": masked(torch.expm1(log_ratio) - log_ratio, mask).sum(),
        }
    if dual_clip is not None:
        objective, stats["dual_clip_sum"] = _bounded_below(objective, advantage, dual_clip)
    if weights is not None:
        objective = objective * masked(weights.detach(), mask)
    loss = -(objective * worth).sum()
    for name, term, scale in (("entropy_sum", entropy, -entropy_bonus), ("loss_kl_sum", kl, kl_coefficient)):
        if term is not None:
            kept = masked(term, mask)
            stats[name] = kept.detach().sum()
            if scale:
                loss = loss + scale * (kept * worth).sum()
    return loss, worth.sum(), stats


def _bounded_below(objective: Tensor, advantage: Tensor, dual_clip: float) -> tuple[Tensor, Tensor]:
    """(the objective, no less than dual_clip * advantage where that is negative; how many tokens are at the bound)."""
    if dual_clip <= 1.0:
        raise ValueError(f"dual_clip is {dual_clip}; it must be more than 1, or it would bound ratios of 1")
    floor = torch.where(advantage < 0, dual_clip * advantage, torch.full_like(advantage, -torch.inf))
    return torch.maximum(objective, floor), (objective.detach() < floor).to(objective.dtype).sum()


def _row_mean(x: Tensor, worth: Tensor, mask: Tensor) -> Tensor:
    """[B, T] on each reply token the mean of `x` over its row, weighted by `worth`; 0 elsewhere."""
    total = worth.sum(dim=1, keepdim=True)
    mean = (x * worth).sum(dim=1, keepdim=True) / torch.where(total > 0, total, torch.ones_like(total))
    return masked(mean.expand(x.shape), mask)


def aggregate(
    mask: Tensor, token_weights: Tensor | None, how: Aggregation, constant: float
) -> tuple[Tensor | None, Tensor | None]:
    """How the tokens of a batch are averaged, as weights for `policy_loss` and the count to divide its sum by.

        token_mean     sum over all tokens of v l / sum of v                    every token alike (DAPO)
        sequence_mean  mean over replies of (sum_t v_t l_t / sum_t v_t)         every reply alike (GRPO)
        constant       mean over replies of (sum_t v_t l_t / constant)          no division by a reply's own length,
                                                                                which favours long bad ones (Dr.GRPO)

    Args:
        mask: [B, T] 1 on reply tokens.
        token_weights: [B, T] v, 0 under the mask; None for 1 on each reply token.
        constant: tokens; the longest reply allowed, say.

    Returns:
        (token_weights, count) for the batch; None: those `policy_loss` has of itself.
    """
    if how == "token_mean":
        return token_weights, None
    weights = masked(
        torch.ones_like(mask, dtype=torch.float32) if token_weights is None else token_weights, mask
    )
    total = weights.sum(dim=1, keepdim=True)
    replies = count(total)
    if how == "constant":
        return weights / constant, replies
    return weights / torch.where(total > 0, total, torch.ones_like(total)), replies


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
