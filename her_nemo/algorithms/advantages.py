"""Advantages: how much better a token was than the critic expected, or a reply than others to the same prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from her_nemo.algorithms.masking import masked, wide


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


# ---------------------------------------------------------------- relative to the other replies to a prompt


@torch.no_grad()
def centred(
    rewards_B: Tensor, group_size: int, keep_B: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards less the mean of their group; what all group-relative estimators begin with.

    Rows come group by group: rows i*G .. i*G + G - 1 are replies to one prompt. In float64, or rounding would make
    a spread of a group whose rewards are all equal, and dividing by it an advantage.

    Args:
        rewards_B: [B] reward of each reply.
        group_size: G, 2 or more; B is a multiple of it.
        keep_B: [B] False for replies without a reward: they count in no mean, and get 0.

    Returns:
        (centred_NG, keep_NG, count_N1): [B/G, G] with 0 where not kept, and how many of each group are kept.

    Raises:
        ValueError: G is less than 2 or does not divide B.
    """
    if group_size < 2 or rewards_B.numel() % group_size:
        raise ValueError(f"{rewards_B.numel()} rewards are not whole groups of {group_size} (2 or more)")
    rewards = rewards_B.double().view(-1, group_size)
    keep = torch.ones_like(rewards, dtype=torch.bool) if keep_B is None else (keep_B != 0).view_as(rewards)
    count = keep.sum(dim=1, keepdim=True).double()
    mean = masked(rewards, keep).sum(dim=1, keepdim=True) / count.clamp(min=1.0)
    return masked(rewards - mean, keep), keep, count


def rloo(rewards_B: Tensor, group_size: int, keep_B: Tensor | None = None) -> Tensor:
    """Leave-one-out: A_i = r_i - mean_{j != i} r_j, which is G / (G - 1) (r_i - mean). 0 for a reply alone.

    Unbiased: the baseline of a reply does not depend on it. Kool et al., "Buy 4 REINFORCE samples, get a baseline
    for free!" (2019); for language models Ahmadian et al., "Back to basics" (2024, arXiv 2402.14740). Shapes as
    `centred`; returns [B].
    """
    found, _, count = centred(rewards_B, group_size, keep_B)
    return _flat(found * count / (count - 1.0).clamp(min=1.0), rewards_B)


def dr_grpo(rewards_B: Tensor, group_size: int, keep_B: Tensor | None = None) -> Tensor:
    """A_i = r_i - mean, without the division by the spread, which weights easy and hard prompts more than others.

    Its other half is the loss: the aggregation "constant" in place of a mean over each reply's tokens. Liu et al.,
    "Understanding R1-Zero-like training" (2025, arXiv 2503.20783). Shapes as `centred`; returns [B].
    """
    return _flat(centred(rewards_B, group_size, keep_B)[0], rewards_B)


def grpo(rewards_B: Tensor, group_size: int, keep_B: Tensor | None = None, epsilon: float = 1e-6) -> Tensor:
    """A_i = (r_i - mean) / (std + epsilon), with the population's standard deviation of the group.

    Shao et al., "DeepSeekMath" (2024, arXiv 2402.03300), outcome supervision. Shapes as `centred`; returns [B].
    """
    found, _, count = centred(rewards_B, group_size, keep_B)
    spread = (found.square().sum(dim=1, keepdim=True) / count.clamp(min=1.0)).sqrt()
    return _flat(found / (spread + epsilon), rewards_B)


def her(rewards_B: Tensor, group_size: int, clip: float, keep_B: Tensor | None = None) -> Tensor:
    """HER's group-relative variant: A_i = clamp(GRPO's A_i, -clip, clip).

    From HER (Du et al. 2026, arXiv 2601.21459), as summaries of it tell: the policy starts from SFT; a generative
    judge compares each reply with one of the frozen SFT model to the same context, win 1, tie 0, loss -1; these
    rewards feed a clipped policy objective in the manner of GRPO. The paper's own formula was not at hand: mean and
    spread are GRPO's, and the bound on the advantage is ours. It is for rewards of three values, where one reply
    that differs from its G - 1 like group-mates has |A| = sqrt(G - 1), which grows with the group.
    Shapes as `centred`; returns [B].
    """
    return grpo(rewards_B, group_size, keep_B).clamp(-clip, clip)


def on_tokens(advantages_B: Tensor, mask_BT: Tensor) -> Tensor:
    """[B, T] the advantage of a reply on each of its tokens, 0 under the mask."""
    return masked(advantages_B.unsqueeze(1).expand(mask_BT.shape), mask_BT)


def _flat(advantages_NG: Tensor, like_B: Tensor) -> Tensor:
    return advantages_NG.reshape(-1).to(wide(like_B).dtype)
