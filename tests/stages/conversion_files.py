"""Trained checkpoints of small models with all sizes different, as training stages leave them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from her_nemo.config import compose
from her_nemo.megatron import forward, optimizer, parallel, qwen3, state
from her_nemo.megatron.qwen3 import Qwen3Shape
from her_nemo.training import checkpoint
from her_nemo.training import source as sources

SHAPE = Qwen3Shape(
    num_layers=3, hidden_size=48, ffn_hidden_size=80, num_attention_heads=4, num_query_groups=2, kv_channels=16,
    vocab_size=1117, rotary_base=10000.0, max_position_embeddings=128, tied=True,
)  # fmt: skip
# vLLM's attention on CPU knows no heads narrower than 32.
SERVED = replace(SHAPE, hidden_size=64, ffn_hidden_size=96, kv_channels=32)
UNTIED = replace(SHAPE, tied=False)
STEPS = 12


def train(head: str, shape: Qwen3Shape, seed: int) -> qwen3.Model:
    """A model far from its initialisation: an SFT-like or a value-like loss on random tokens, with a high rate."""
    torch.manual_seed(seed)
    model = qwen3.build(shape, head=head)
    opt = optimizer.optimizer(model, lr=2e-2, weight_decay=0.1)

    def loss(said: forward.TokenOutputs, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, dict]:
        if head == "lm":
            per_token = -said.log_probs_BT
        else:
            per_token = (said.values_BS - batch["tokens_BS"] / 500.0) ** 2
        return per_token.sum(), torch.tensor(per_token.numel()), {}

    for step in range(STEPS):
        tokens = torch.randint(0, shape.vocab_size, (4, 24))
        forward.forward_backward(model, [{"tokens_BS": tokens}], loss)
        optimizer.step(opt, step)
    return model


def write(directory: Path, models: dict[str, tuple[str, Qwen3Shape]], tokenizer: Path) -> Path:
    """A finished checkpoint that holds one trained model for each part."""
    parallel.initialize(seed=5)
    try:
        trained = {part: train(*what, seed=index) for index, (part, what) in enumerate(models.items())}

        def save(where: Path) -> None:
            for part, model in trained.items():
                state.save(where / part, model)

        checkpoint.write(
            directory, STEPS, save, models={part: sources.describe(model) for part, model in trained.items()},
            counters={}, config={}, tokenizer=tokenizer,
        )  # fmt: skip
    finally:
        parallel.destroy()
    return directory


def load(stage: str, **values: Any) -> Any:
    """The configuration of a stage with these keys."""
    words = []
    for key, value in values.items():
        name = key.replace("__", ".")
        words.append(f"{name}={value}" if isinstance(value, int) else compose.assign(name, value))
    return compose.load(stage, words)
