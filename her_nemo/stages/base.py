"""The demo's base model: a tiny Qwen3 from scratch, trained on plain text with transformers alone.

Users bring a real Qwen3 and never run this. It is kept in plain Hugging Face and torch on purpose:
the base must exist before anything of Megatron has touched it, or the conversion would prove nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from her_nemo.config.errors import UserError
from her_nemo.config.schema import Architecture, BaseConfig
from her_nemo.data.sources import read_jsonl
from her_nemo.data.tokenise import Tokeniser, pack_text
from her_nemo.megatron.qwen3 import Qwen3Shape
from her_nemo.training.logging import MetricLogger, progress, quiet_transformers

THREADS = 2


def run(cfg: BaseConfig, model: Architecture, *, text: Path, tokenizer: Path, out: Path, seed: int) -> None:
    """Train a base on `text` (JSON lines with "text") and write it to `out` in Hugging Face form."""
    quiet_transformers()
    torch.manual_seed(seed)
    # The order of sums, and so every later figure of the demo, depends on it: not left to the environment.
    torch.set_num_threads(THREADS)
    tokeniser = Tokeniser(tokenizer)
    rows, _ = read_jsonl(text, kind="text")
    # One <|endoftext|> between documents, as base models see them.
    blocks = np.stack(list(pack_text((tokeniser.text_ids(row["text"]) for row in rows), cfg.sequence_length)))
    network = Qwen3ForCausalLM(hf_config(model, tokeniser))
    initialise(network)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay
    )
    with MetricLogger(out.parent, enabled=True) as metrics:
        batches = _batches(blocks, cfg.batch_size, seed)
        for step in progress(range(1, cfg.steps + 1), total=cfg.steps, done=0, title="base", enabled=True):
            rate = learning_rate(step, cfg.steps, cfg.lr, cfg.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            tokens_BS = torch.from_numpy(next(batches)).long()
            loss = network(input_ids=tokens_BS, labels=tokens_BS).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            metrics.log(step, {"train/loss": loss.item(), "train/lr": rate, "train/grad_norm": norm.item()})
    network.save_pretrained(out)
    tokeniser.hf.save_pretrained(out)
    print(f"base: {sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters in {out}")


@torch.no_grad()
def initialise(network: Qwen3ForCausalLM) -> None:
    """Unit embeddings, a quiet final norm, small writes into the residual stream.

    With transformers' 0.02 everywhere a model of this size does not learn to copy names within a million tokens.
    """
    network.model.embed_tokens.weight.normal_(std=1.0)
    network.model.norm.weight.fill_(0.1)
    for layer in network.model.layers:
        layer.self_attn.o_proj.weight.mul_(0.35)
        layer.mlp.down_proj.weight.mul_(0.35)


def hf_config(model: Architecture, tokeniser: Tokeniser) -> Qwen3Config:
    """transformers' config of the model that `model` describes, over this tokenizer's vocabulary."""
    if model.vocab_size is not None and model.vocab_size < tokeniser.vocab_size:
        raise UserError(
            f"model.vocab_size={model.vocab_size} is less than the tokenizer's {tokeniser.vocab_size}."
        )
    described = Qwen3Shape.from_config(model).to_hf_config()
    return Qwen3Config(**described | {"eos_token_id": tokeniser.eos_id, "pad_token_id": tokeniser.pad_id})


def learning_rate(step: int, total: int, peak: float, warmup: int) -> float:
    """Linear warm-up to `peak`, then half a cosine down to a tenth of it."""
    if step <= warmup:
        return peak * step / max(1, warmup)
    share = (step - warmup) / max(1, total - warmup)
    return peak * (0.55 + 0.45 * math.cos(math.pi * share))


def _batches(blocks: np.ndarray, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Shuffled batches [B, S] without end, every block once an epoch."""
    order = list(range(len(blocks)))
    shuffler = random.Random(seed)
    while True:
        shuffler.shuffle(order)
        for begin in range(0, len(order) - batch_size + 1, batch_size):
            yield blocks[order[begin : begin + batch_size]]
