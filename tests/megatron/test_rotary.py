"""Our rotary embedding gives megatron-core's numbers to the bit, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer import attention
from tiny import TINY

from her_nemo.megatron import qwen3
from her_nemo.megatron.precision import precision
from her_nemo.megatron.rotary import RotaryEmbedding


def angles(length: int, dim: int = 16) -> torch.Tensor:
    half = torch.arange(length)[:, None] / 100.0 ** (torch.arange(0, dim, 2) / dim)
    return torch.cat([half, half], dim=-1)[:, None, None]


def both(x: torch.Tensor, freqs: torch.Tensor, config: object) -> tuple[list[torch.Tensor], RotaryEmbedding]:
    """Result and gradient by megatron-core and by us."""
    ours, found = RotaryEmbedding(rope_utils.apply_rotary_pos_emb), []
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    for way in (rope_utils.apply_rotary_pos_emb, ours):
        leaf = x.clone().requires_grad_()
        result = way(leaf.transpose(0, 1), freqs, config)
        result.backward(upstream.transpose(0, 1))
        found += [result.detach(), leaf.grad]
    return found, ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_the_bit(dtype: torch.dtype) -> None:
    config = qwen3.transformer_config(TINY, settings=precision("32"))
    x = torch.randn(3, 11, 4, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    freqs = angles(11)
    (theirs, their_grad, ours, our_grad), way = both(x, freqs, config)
    assert ours.abs().max() > 1.0
    assert torch.equal(ours, theirs)
    assert torch.equal(our_grad, their_grad)
    # Angles of another forward are not mistaken for those that are kept.
    again = way(x.transpose(0, 1), freqs * 2, config)
    assert torch.equal(again, rope_utils.apply_rotary_pos_emb(x.transpose(0, 1), freqs * 2, config))
    assert not torch.equal(again, ours)


def test_other_kinds_are_left_to_megatron_core() -> None:
    config = qwen3.transformer_config(TINY, settings=precision("32"))
    x, freqs = torch.randn(5, 2, 4, 16), angles(5)
    partial = angles(5, 8)
    for given, settings in ((partial, config), (freqs, replace(config, rotary_interleaved=True))):
        ours = RotaryEmbedding(rope_utils.apply_rotary_pos_emb)(x, given, settings)
        assert torch.equal(ours, rope_utils.apply_rotary_pos_emb(x, given, settings))


def test_the_model_uses_it_on_the_cpu() -> None:
    assert isinstance(attention.apply_rotary_pos_emb, RotaryEmbedding) is not torch.cuda.is_available()
