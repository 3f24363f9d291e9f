"""The transformer layer: which modules it is made of, with and without Transformer Engine.

Without Transformer Engine the layer is megatron-core's own, with two modules of ours: scaled-dot-product
attention (grouped queries, causal or with an explicit mask) and an RMSNorm that knows sequence parallelism.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from her_nemo.megatron import platform
from her_nemo.megatron.shared_prompts import SharedPrompts


class RmsNorm(torch.nn.Module):
    """RMSNorm over the last dimension (Zhang & Sennrich 2019), computed in fp32 inside torch's kernel.

    Under sequence parallelism each rank sees its own part of the sequence, so the weight is marked and
    finalize_model_grads sums its gradient over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=platform.device())
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden] -> the same shape and dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class SdpaAttention(MegatronModule):
    """Core attention through torch's scaled_dot_product_attention.

    Packed sequences (megatron-core's "thd" layout) are attended one by one, each causally: the cost is the sum of
    their squares, and nothing crosses a border. `SharedPrompts` says itself who looks at whom.

    An explicit mask is boolean, broadcastable to [B, heads, Sq, Sk], True where attention is NOT allowed
    (megatron-core's convention), and complete: causality must be in it. Without one, attention is causal, or full
    when megatron-core says so (one new token against a cache).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size != 1:
            raise NotImplementedError("SdpaAttention has no context parallelism")
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.grouped = config.num_query_groups != config.num_attention_heads
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """query [Sq, B, heads, D], key and value [Sk, B, groups, D] -> [Sq, B, heads * D].

        Packed: query [T, heads, D], key and value [T, groups, D] -> [T, heads * D].
        """
        if attention_bias is not None:
            raise NotImplementedError("SdpaAttention takes a boolean mask, not a bias")
        if packed_seq_params is not None:
            if attention_mask is not None:
                raise NotImplementedError("SdpaAttention takes packed sequences or a mask, not both")
            if isinstance(packed_seq_params, SharedPrompts):
                return packed_seq_params.attend(query, key, value, scale=self.softmax_scale, grouped=self.grouped)
            return self._packed(query, key, value, packed_seq_params)
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        length, batch = query.shape[0], query.shape[1]
        mask = None if attention_mask is None else ~attention_mask
        causal = mask is None and mask_type is not AttnMaskType.no_mask and length > 1
        if causal and key.shape[0] != length:
            # SDPA aligns a causal mask at the first key; new tokens after a cache align at the last.
            offset = key.shape[0] - length
            mask = torch.ones(length, key.shape[0], dtype=torch.bool, device=query.device).tril(offset)
            causal = False
        context = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
            scale=self.softmax_scale,
            enable_gqa=self.grouped,
        )
        return context.permute(2, 0, 1, 3).reshape(length, batch, -1)

    def _packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSeqParams
    ) -> torch.Tensor:
        borders = packed.cu_seqlens_q.tolist()
        if borders[-1] != query.shape[0]:
            raise ValueError(f"packed sequences end at {borders[-1]}, the row at {query.shape[0]}")
        lengths = [end - begin for begin, end in pairwise(borders)]
        parts = [
            F.scaled_dot_product_attention(
                q.transpose(0, 1).unsqueeze(0),
                k.transpose(0, 1).unsqueeze(0),
                v.transpose(0, 1).unsqueeze(0),
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=True,
                scale=self.softmax_scale,
                enable_gqa=self.grouped,
            )
            for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        ]
        context = torch.cat(parts, dim=2)  # [1, heads, T, D]
        return context[0].transpose(0, 1).reshape(query.shape[0], -1)


def with_masks(core: type) -> type:
    """`core` for causal and packed attention, SdpaAttention where a mask is given or prompts are shared.

    Transformer Engine's attention takes a mask only for mask types that its fast kernels do not know, and ignores it
    without a word when the type is causal: left-padded rollouts would attend to their padding.
    """

    class MaskedAttention(core):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.masked = SdpaAttention(**settings)

        def forward(
            self,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: torch.Tensor | None = None,
            attn_mask_type: AttnMaskType | None = None,
            attention_bias: torch.Tensor | None = None,
            packed_seq_params: PackedSeqParams | None = None,
        ) -> torch.Tensor:
            ours = attention_mask is not None or isinstance(packed_seq_params, SharedPrompts)
            chosen = self.masked if ours else super().forward
            return chosen(
                query, key, value, attention_mask, attn_mask_type=attn_mask_type, attention_bias=attention_bias,
                packed_seq_params=packed_seq_params,
            )  # fmt: skip

    return MaskedAttention


def layer_spec(config: TransformerConfig, *, fused: bool) -> ModuleSpec | TransformerBlockSubmodules:
    """The modules of this pipeline stage's layers: Transformer Engine's if `fused`, else ours."""
    if fused:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True)
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = with_masks(attention.core_attention)
        return layer
    layer = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    layer.submodules.input_layernorm = RmsNorm
    layer.submodules.pre_mlp_layernorm = RmsNorm
    attention = layer.submodules.self_attention.submodules
    attention.q_layernorm = RmsNorm
    attention.k_layernorm = RmsNorm
    attention.core_attention = SdpaAttention
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RmsNorm
    )
