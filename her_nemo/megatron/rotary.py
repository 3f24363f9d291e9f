"""Rotary position embedding for the CPU: megatron-core's numbers to the bit, in half the passes over memory.

megatron-core takes cosine and sine anew for queries and keys of every layer, builds the rotated copy by concatenation
and concatenates an empty rest behind the result. On a small model that is a tenth of a training step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class _Rotate(torch.autograd.Function):
    """y = (x1 cos1 - x2 sin1, x2 cos2 + x1 sin2), the halves of the last dimension being 1 and 2."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        (x1, x2), (cos1, cos2), (sin1, sin2) = (part.chunk(2, dim=-1) for part in (x, cos, sin))
        y = x.new_empty(x.shape)
        y1, y2 = y.chunk(2, dim=-1)
        # Products first, then their sum: a fused multiply-add would round once where megatron-core rounds twice.
        torch.mul(x1, cos1, out=y1).sub_(x2 * sin1)
        torch.mul(x2, cos2, out=y2).add_(x1 * sin2)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        (g1, g2), (cos1, cos2), (sin1, sin2) = (part.chunk(2, dim=-1) for part in (grad, cos, sin))
        out = grad.new_empty(grad.shape)
        out1, out2 = out.chunk(2, dim=-1)
        torch.mul(g1, cos1, out=out1).add_(g2 * sin2)
        torch.mul(g2, cos2, out=out2).sub_(g1 * sin1)
        return out, None, None


class RotaryEmbedding:
    """Takes the place of megatron-core's `apply_rotary_pos_emb`, which it calls for all that it does not do itself:
    packed sequences, fused kernels, interleaved or partial rotation."""

    def __init__(self, original: Callable[..., torch.Tensor]) -> None:
        self._original = original
        self._angles: torch.Tensor | None = None
        self._table: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(
        self,
        t: torch.Tensor,
        freqs: torch.Tensor,
        config: Any,
        cu_seqlens: torch.Tensor | None = None,
        mscale: float = 1.0,
        cp_group: Any = None,
    ) -> torch.Tensor:
        """t [S, B, heads, D], freqs [S, 1, 1, D] angles -> [S, B, heads, D]."""
        plain = cu_seqlens is None and mscale == 1.0 and freqs.shape[-1] == t.shape[-1]
        if not plain or config.apply_rope_fusion or config.rotary_interleaved or config.multi_latent_attention:
            return self._original(t, freqs, config, cu_seqlens=cu_seqlens, mscale=mscale, cp_group=cp_group)
        cos, sin = self._of(freqs)
        return _Rotate.apply(t, cos.to(t.dtype), sin.to(t.dtype))

    def _of(self, freqs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, kept for the next layer, which is given the same tensor of angles."""
        # What decoding has kept, in inference mode, autograd cannot save.
        unfit = self._table is None or (self._table[0].is_inference() and not torch.is_inference_mode_enabled())
        if unfit or self._angles is not freqs:
            self._angles, self._table = freqs, (torch.cos(freqs), torch.sin(freqs))
        assert self._table is not None
        return self._table
