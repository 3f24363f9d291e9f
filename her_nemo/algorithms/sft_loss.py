"""Negative log-likelihood of the trained tokens."""

from __future__ import annotations

from torch import Tensor

from her_nemo.algorithms.masking import masked, wide


def masked_nll(log_probs_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over trained tokens of -log p(token), and how many there are.

        loss = - sum_bt m_bt log p(x_b,t+1 | x_b,<=t),    count = sum_bt m_bt

    Args:
        log_probs_BT: [B, T] log-probability of the next token.
        mask_BT: [B, T] 1 on trained tokens; other non-negative values weight a token in the sum and the
        count.

    Returns:
        (loss_sum, token_count), scalars in float32 (float64 for float64 input).
    """
    weights = wide(mask_BT)
    nll = -masked(log_probs_BT, mask_BT)
    return (nll * weights).sum(), weights.sum()
