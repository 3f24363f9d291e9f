"""Layers named and nested as Transformer Engine's are, in plain torch: megatron-core's own TE spec builds them.

Only the kernels are others. A norm is part of the linear map after it, as `layer_norm_weight`, and what is saved and
under which key is what megatron-core's wrappers of Transformer Engine save.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from her_nemo.megatron import attention, qwen3
from her_nemo.megatron.attention import RmsNorm, SdpaAttention

# Every parameter of a layer of Transformer Engine's modules, from megatron-core's extensions/transformer_engine.py.
LAYER_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
    "self_attention.linear_proj.weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
}


class NormLinear(ColumnParallelLinear):
    """What TELayerNormColumnParallelLinear computes; its sharding is the base class's, as it is there."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **settings: Any) -> None:
        super().__init__(input_size, output_size, config=config, **settings)
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))

    def forward(self, input_: torch.Tensor, *rest: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        normed = F.rms_norm(input_, self.layer_norm_weight.shape, self.layer_norm_weight, self.eps)
        return super().forward(normed, *rest, **more)


class Provider(LocalSpecProvider):
    """Stands where megatron-core asks Transformer Engine for its modules."""

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return NormLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return RmsNorm

    def core_attention(self) -> type:
        return SdpaAttention


@contextmanager
def te_shaped() -> Iterator[None]:
    """Models built inside have Transformer Engine's layers, in plain torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt_layer_specs, "TESpecProvider", Provider, raising=False)
        patch.setattr(qwen3, "layer_spec", lambda config, fused: attention.layer_spec(config, fused=True))
        yield
