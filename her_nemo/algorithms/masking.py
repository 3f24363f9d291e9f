"""Masked tensors: padding must not reach a sum, nor a gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or float64 if it is that already (gradient checks)."""
    return x if x.dtype == torch.float64 else x.float()


def masked(x: Tensor, mask: Tensor, fill: float = 0.0) -> Tensor:
    """`x` where the mask is not 0, `fill` elsewhere, in float32 (or float64).

    Multiplying by the mask would turn a NaN or infinity under a 0 into a NaN; `where` does not. Apply it
    before any exp or square, not after, or the backward pass makes 0 * inf of it.
    """
    x = wide(x)
    return torch.where(mask != 0, x, torch.full((), fill, dtype=x.dtype, device=x.device))


def weigh_kinds(mask_BT: Tensor, kinds_BT: Tensor, weights_K: Tensor) -> Tensor:
    """[B, T] the mask times the weight of each token's segment kind: what a weighted mean over tokens weighs with.

    Args:
        mask_BT: [B, T] 1 on trained tokens.
        kinds_BT: [B, T] integers that index `weights_K`.
        weights_K: [K] non-negative weight of each kind.
    """
    table = weights_K.to(mask_BT.device, torch.float32)
    return wide(mask_BT) * table[kinds_BT.long()]


def count(mask: Tensor) -> Tensor:
    """How many tokens the mask keeps, as a float scalar."""
    return (mask != 0).sum().to(torch.float32)
