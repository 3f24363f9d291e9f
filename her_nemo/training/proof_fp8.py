"""Proof of an export in FP8: every weight is the checkpoint's but for rounding, and the model says nearly the same.

The rounding of a number to e4m3 has a bound, so every single weight is held against it. Outputs have none: what they
differ by is written down, and a difference that no rounding makes is a failure.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

from her_nemo.megatron import block_fp8
from her_nemo.megatron.block_fp8 import Dequantised
from her_nemo.megatron.safetensors_files import HfTensors
from her_nemo.megatron.streaming import Tensors
from her_nemo.training.proof import Findings, head_of, probe_tokens

# Outputs of one layer may differ by this share of the largest, whole models by this angle: far above what rounding does
# (a few hundredths), far below what a wrong map does (about 1).
LAYER_TOLERANCE = 0.25
LEAST_COSINE = 0.95
_SHOWN = 5


def weights_agree(directory: Path, held: Tensors, found: Findings) -> None:
    """Dequantised weights against the checkpoint's, number by number; the largest errors go into the proof."""
    written = Dequantised(HfTensors(directory))
    wrong: list[str] = []
    largest, of_block = 0.0, 0.0
    for name in sorted(filter(block_fp8.is_quantised, written.names())):
        for start, stop in written.row_blocks(name):
            wanted, got = held.rows(name, start, stop).float(), written.rows(name, start, stop)
            scales = written.scales(name, start, stop)
            error = (got - wanted).abs()
            if not bool((error <= block_fp8.allowed_error(wanted, scales)).all()):
                wrong.append(name)
                break
            # Of numbers below e4m3's normal range the error is a share of the block, not of the number.
            ones = torch.ones_like(wanted)
            normal = wanted.abs() >= block_fp8.dequantise(ones * 2.0**-6, scales)
            largest = max(largest, float((error / wanted.abs())[normal].max()) if bool(normal.any()) else 0.0)
            of_block = max(of_block, float((error / block_fp8.dequantise(ones, scales)).max()) / block_fp8.LARGEST)
    written.close()
    if wrong:
        found.failures.append(f"weights differ by more than rounding to e4m3: {', '.join(wrong[:_SHOWN])}")
    found.body["fp8"] = {
        "max_relative_error": largest,
        "max_relative_error_bound": block_fp8.RELATIVE_BOUND,
        "max_error_over_largest_of_block": of_block,
        "weight_block_size": [block_fp8.BLOCK, block_fp8.BLOCK],
    }


@torch.no_grad()
def outputs_close(directory: Path, config: Qwen3Config, outputs: torch.Tensor, found: Findings) -> None:
    """What transformers computes in fp32 from the dequantised weights, beside what Megatron computed unrounded."""
    head = head_of(config)
    config = copy.deepcopy(config)
    # The model under a scalar head is made in the config's dtype.
    config.dtype = torch.float32
    network = (Qwen3ForCausalLM if head == "lm" else Qwen3ForSequenceClassification)(config)
    written = Dequantised(HfTensors(directory))
    tensors = {name: written.whole(name).float() for name in written.names()}
    written.close()
    missing, unexpected = network.load_state_dict(tensors, strict=False)
    absent = set(missing) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    if absent or unexpected:
        found.failures.append(f"transformers' model has other names: {sorted(absent | set(unexpected))[:_SHOWN]}")
        return
    network.eval()
    tokens = probe_tokens(config.vocab_size)
    if head == "lm":
        theirs = network(input_ids=tokens).logits.float()
    else:
        theirs = network.score(network.model(input_ids=tokens).last_hidden_state)[..., 0].float()
    cosine = float(torch.cosine_similarity(theirs.flatten().double(), outputs.flatten().double(), dim=0))
    if not cosine >= LEAST_COSINE:
        found.failures.append(f"outputs have a cosine of {cosine:.4f}, less than {LEAST_COSINE}")
    same = float((theirs.argmax(-1) == outputs.argmax(-1)).float().mean()) if head == "lm" else 1.0
    found.body |= {
        "logits_max_abs_diff": float((theirs - outputs).abs().max()),
        "logits_largest": float(outputs.abs().max()),
        "cosine": cosine,
        "top1_agreement": same,
    }
