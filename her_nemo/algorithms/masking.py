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


def count(mask: Tensor) -> Tensor:
    """How many tokens the mask keeps, as a float scalar."""
    return (mask != 0).sum().to(torch.float32)
