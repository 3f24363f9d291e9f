"""What the GPU tests measure, as functions of the precision; test_checks_run_here runs the same code small."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import Qwen3ForCausalLM

from her_nemo.megatron import forward, optimizer, platform, qwen3, weights
from her_nemo.megatron.precision import Precision, precision
from her_nemo.megatron.qwen3 import Model, Qwen3Shape

# Every side a multiple of 128, so that any FP8 recipe takes it.
SMALL = Qwen3Shape(
    num_layers=4, hidden_size=512, ffn_hidden_size=1536, num_attention_heads=8, num_query_groups=4, kv_channels=64,
    vocab_size=4096, rotary_base=10000.0, tied=False, max_position_embeddings=1024, init_method_std=0.06,
)  # fmt: skip
TINY = replace(SMALL, num_layers=2, hidden_size=128, ffn_hidden_size=256, num_attention_heads=2, num_query_groups=2,
               vocab_size=512)  # fmt: skip


def hugging_face(directory: Path, shape: Qwen3Shape = SMALL) -> Path:
    """A random model of transformers' own making."""
    from transformers import Qwen3Config

    torch.manual_seed(7)
    config = Qwen3Config(**shape.to_hf_config())
    Qwen3ForCausalLM(config).save_pretrained(directory)
    return directory


def tokens(shape: Qwen3Shape, rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, shape.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def with_layers(name: str, *, transformer_engine: bool | None) -> Precision:
    """A `trainer.precision` with the kind of layers forced."""
    return replace(precision(name), transformer_engine=transformer_engine)


@torch.no_grad()
def parity(directory: Path, settings: Precision) -> dict[str, float]:
    """Logits against transformers' in fp32: how far ours are, and how far transformers' own are in the same dtype."""
    shape = Qwen3Shape.from_hf_dir(directory)
    batch = tokens(shape, 2, 128)
    exact = Qwen3ForCausalLM.from_pretrained(directory, dtype=torch.float32)(input_ids=batch).logits
    where = platform.device()
    rounded = Qwen3ForCausalLM.from_pretrained(directory, dtype=settings.params_dtype).to(where)
    theirs = rounded(input_ids=batch.to(where)).logits.float().cpu()
    model = qwen3.build(shape, dtype=settings, trainable=False)
    weights.load_hf(model, directory)
    ours = forward.logits(model, batch).cpu()
    scale = float(exact.abs().max())
    return {
        "ours": float((ours - exact).abs().mean()) / scale,
        "theirs": float((theirs - exact).abs().mean()) / scale,
        "cosine": float(torch.cosine_similarity(ours.flatten().double(), exact.flatten().double(), dim=0)),
        "top1_agreement": float((ours.argmax(-1) == exact.argmax(-1)).float().mean()),
    }


def nll(said: forward.TokenOutputs, _: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, dict]:
    return -said.log_probs_BT.sum(), torch.tensor(said.log_probs_BT.numel()), {}


def losses(model: Model, steps: int, *, rows: int = 4, length: int = 96, packed: bool = False) -> list[float]:
    """The loss of each of so many steps on one repeated batch, which a model that learns gets to know."""
    opt = optimizer.optimizer(model, lr=2e-3, weight_decay=0.0)
    batch = {"tokens_BS": tokens(model.shape, rows, length, seed=3)}
    if packed:
        batch = {
            "tokens_BS": batch["tokens_BS"].view(1, -1),
            "cu_seqlens": torch.arange(0, rows * length + 1, length, dtype=torch.int32),
        }
    found = []
    for step in range(steps):
        report = forward.forward_backward(model, [batch], nll)[0]
        found.append(float(report["loss_sum"] / report["count"]))
        optimizer.step(opt, step)
    return found


def trained(directory: Path, settings: Precision, steps: int, **options: int) -> list[float]:
    """`losses` of the model in `directory`."""
    model = qwen3.build(Qwen3Shape.from_hf_dir(directory), dtype=settings, distributed_optimizer=True)
    weights.load_hf(model, directory)
    return losses(model, steps, **options)
