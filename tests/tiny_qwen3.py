"""Random Qwen3 models small enough to make in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM


def tiny_config(**changes: Any) -> Qwen3Config:
    """One layer of width 64 with two query heads and one key/value head of 32, but for what `changes` says.

    32 is the smallest head that vLLM has on CPU.
    """
    sizes: dict[str, Any] = {
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
    }
    return Qwen3Config(**sizes | changes)


def tiny_model(out: Path, *, seed: int = 0, tokenizer: PreTrainedTokenizerBase | None = None, **changes: Any):
    """A float32 model of `tiny_config(**changes)`, also saved under `out`.

    With a tokenizer the model has its vocabulary and control tokens, and the tokenizer is saved beside it.
    """
    if tokenizer is not None:
        changes = {
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
            "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        } | changes
        tokenizer.save_pretrained(out)
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(tiny_config(**changes)).eval()
    model.save_pretrained(out)
    return model
