"""The smallest Qwen3 that has every kind of tensor, with all sizes different."""

from __future__ import annotations

from her_nemo.megatron.qwen3 import Qwen3Shape

TINY = Qwen3Shape(
    num_layers=2,
    hidden_size=48,
    ffn_hidden_size=80,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=101,
    rotary_base=10000.0,
    max_position_embeddings=64,
)
