"""Correcting for samples drawn by another program: the engine's log-probs are not quite the trainer's.

The engine samples from mu, the trainer differentiates pi; with other kernels and precisions the two differ
for equal weights. Weighting a token by pi(t)/mu(t) makes the gradient unbiased; truncating the weight bounds
its variance. Ionides, "Truncated importance sampling" (2008); for rollout engines Yao et al., "Your
efficient RL framework secretly brings you off-policy RL training" (2025).
"""

from __future__ import annotations

import torch
from torch import Tensor

from her_nemo.algorithms.masking import count, masked


def _log_ratio(trainer_BT: Tensor, rollout_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return masked(trainer_BT, mask_BT) - masked(rollout_BT, mask_BT)


@torch.no_grad()
def truncated_weights(trainer_BT: Tensor, rollout_BT: Tensor, mask_BT: Tensor, cap: float) -> Tensor:
    """Token weights w_t = min(pi(t) / mu(t), cap), 0 under the mask.

    Args:
        trainer_BT, rollout_BT: [B, T] log-probs of the sampled tokens by the trainer and by the engine.
        cap: the largest weight, at least 1.
    """
    return masked(_log_ratio(trainer_BT, rollout_BT, mask_BT).exp().clamp(max=cap), mask_BT)


@torch.no_grad()
def truncated_sequence_weights(trainer_BT: Tensor, rollout_BT: Tensor, mask_BT: Tensor, cap: float) -> Tensor:
    """One weight for a whole reply, w = min(prod_t pi(t) / mu(t), cap), on each of its tokens, else 0."""
    ratio = _log_ratio(trainer_BT, rollout_BT, mask_BT).sum(dim=1, keepdim=True).exp()
    return masked(ratio.clamp(max=cap).expand(mask_BT.shape), mask_BT)


@torch.no_grad()
def masking_weights(
    trainer_BT: Tensor, rollout_BT: Tensor, mask_BT: Tensor, low: float, high: float
) -> Tensor:
    """Token weights pi(t) / mu(t) inside [low, high] and 0 outside: tokens too far off are left out."""
    ratio = _log_ratio(trainer_BT, rollout_BT, mask_BT).exp()
    return masked(torch.where((ratio >= low) & (ratio <= high), ratio, torch.zeros_like(ratio)), mask_BT)


@torch.no_grad()
def masking_sequence_weights(
    trainer_BT: Tensor, rollout_BT: Tensor, mask_BT: Tensor, low: float, high: float
) -> Tensor:
    """1 on every token of a reply whose ratio lies in [low, high], 0 on the others: replies too far off are left out.

    The ratio of a reply is the geometric mean of its tokens' ratios, exp(mean_t log pi(t) - log mu(t)), so that the
    bounds mean the same at every length.
    """
    total = _log_ratio(trainer_BT, rollout_BT, mask_BT).sum(dim=1, keepdim=True)
    ratio = (total / (mask_BT != 0).sum(dim=1, keepdim=True).clamp(min=1)).exp()
    return masked(((ratio >= low) & (ratio <= high)).to(ratio.dtype).expand(mask_BT.shape), mask_BT)


@torch.no_grad()
def log_prob_gap(trainer_BT: Tensor, rollout_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(sum, max, count) of |log pi(t) - log mu(t)| over the reply tokens: the engine-trainer mismatch."""
    gap = _log_ratio(trainer_BT, rollout_BT, mask_BT).abs()
    return gap.sum(), gap.amax() if gap.numel() else gap.sum(), count(mask_BT)
