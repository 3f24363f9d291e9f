"""A tiny random Qwen3 and what Hugging Face computes with it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

EOS, VOCAB, LENGTH = 2, 1024, 256


def config(*, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=tied, max_position_embeddings=LENGTH,
        initializer_range=0.05,
    )  # fmt: skip


def model(seed: int, *, tied: bool = True) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config(tied=tied)).float().eval()


def write_config(directory: Path, *, tied: bool) -> Path:
    """A directory with the shape alone, as a rollout server gets it."""
    directory.mkdir(parents=True)
    body = config(tied=tied).to_dict() | {"architectures": ["Qwen3ForCausalLM"]}
    (directory / "config.json").write_text(json.dumps(body))
    return directory


def tensors(of: Qwen3ForCausalLM) -> list[tuple[str, torch.Tensor]]:
    """As the trainer gives them: a tied head is not named."""
    tied = of.config.tie_word_embeddings
    return [(name, value) for name, value in of.state_dict().items() if not (tied and name == "lm_head.weight")]


def log_probs(of: Qwen3ForCausalLM, row: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Of every token but the first."""
    with torch.no_grad():
        logits = of(torch.tensor([row])).logits[0, :-1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None])[:, 0]
