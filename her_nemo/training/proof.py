"""Proof that an exported directory is the model that Megatron holds: the same tensors, and the same function.

Tensors: name, shape, dtype and SHA-256 of what lies on the disk, read again, against what came out of the checkpoint
(and, in the full proof, against what a live Megatron model gathers). Function: outputs of transformers, which knows
nothing of our map, against megatron-core's, in fp32 on the same rounded weights, so that only rounding may differ.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding

from her_nemo.megatron import forward, parallel, weights
from her_nemo.megatron.block_fp8 import opened
from her_nemo.megatron.passing_weights import read_when_used
from her_nemo.megatron.qwen3 import Head, Model, Qwen3Shape
from her_nemo.megatron.qwen3_map import EMBEDDING, FINAL_NORM, LM_HEAD, SCORE, hf_shapes
from her_nemo.megatron.safetensors_files import HfTensors, bytes_of
from her_nemo.megatron.single_layer import SingleLayer
from her_nemo.megatron.streaming import digest_head, tensor_digests
from her_nemo.megatron.weights import NamedTensors

PROBES, PROBE_LENGTH, PROBE_SEED = 4, 96, 20_601
LAYER_PROBES, LAYER_PROBE_LENGTH, HEAD_ROWS = 2, 32, 256
MEMORY_SHARE = 0.5
_SHOWN = 5


@dataclass
class Findings:
    """What proof.json will say, and everything that does not hold."""

    body: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def method(wanted: str, shape: Qwen3Shape, head: Head) -> str:
    """ "full" or "layers": what was asked for, or full where both models fit into half of the free memory."""
    if wanted != "auto":
        return wanted
    numbers = sum(torch.Size(size).numel() for size in hf_shapes(shape, head).values())
    shared = parallel.tensor_size() * parallel.pipeline_size()
    return "full" if 4 * numbers * (1 + 1 / shared) < MEMORY_SHARE * _free_memory() else "layers"


def _free_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


# ---------------------------------------------------------------- tensors


def tensors_agree(directory: Path, held: dict[str, str], dtype: torch.dtype, found: Findings) -> None:
    """Every tensor on the disk, read again, is the one that was held: name, shape, dtype, bytes."""
    written = HfTensors(directory)
    found.failures += written.problems
    hashes = tensor_digests(written, {name: _dtype_of(written, name, dtype) for name in sorted(written.names())})
    compare_hashes("the checkpoint", held, hashes, found)
    found.body["tensors"] = {
        name: {
            "shape": list(written.shape(name)),
            "dtype": str(written.dtype(name)).removeprefix("torch."),
            "sha256": hashes[name],
        }
        for name in hashes
    }
    written.close()


def _dtype_of(written: HfTensors, name: str, wanted: torch.dtype) -> torch.dtype:
    """The dtype on the disk: a tensor of another than wanted gets another hash."""
    found = written.dtype(name)
    return found if isinstance(found, torch.dtype) else wanted


def compare_hashes(what: str, held: dict[str, str], written: dict[str, str], found: Findings) -> None:
    """A failure that names the first tensors of which the hashes differ or one is absent."""
    wrong = sorted(name for name in held.keys() | written.keys() if held.get(name) != written.get(name))
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        found.failures.append(f"tensors differ from {what}: {', '.join(wrong[:_SHOWN])}{more}")


@torch.no_grad()
def live_hashes(model: Model, dtype: torch.dtype) -> dict[str, str]:
    """The hash of every tensor that the live model gathers, in `dtype`; on global rank 0 (collective)."""
    hashes: dict[str, str] = {}
    for name, tensor in weights.hf_tensors(model):
        hashes[name] = digest_of(tensor, dtype)
    return hashes


def digest_of(tensor: torch.Tensor, dtype: torch.dtype) -> str:
    """The hash of a tensor in `dtype`, as of one that was written."""
    rounded = tensor.to(dtype).contiguous()
    digest = hashlib.sha256(digest_head(dtype, tuple(rounded.shape)))
    digest.update(bytes_of(rounded))
    return digest.hexdigest()


def round_weights(model: Model, dtype: torch.dtype) -> None:
    """Round an fp32 model's weights to `dtype`, in place, as the export does."""
    round_parameters(model.bare(), dtype)


@torch.no_grad()
def round_parameters(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Round a module's fp32 parameters to `dtype`, in place."""
    for parameter in module.parameters():
        parameter.copy_(parameter.to(dtype))


# ---------------------------------------------------------------- the whole function


def probe_tokens(vocab_size: int) -> torch.Tensor:
    """Fixed random sequences [PROBES, PROBE_LENGTH] over the whole vocabulary."""
    generator = torch.Generator().manual_seed(PROBE_SEED)
    return torch.randint(0, vocab_size, (PROBES, PROBE_LENGTH), generator=generator)


def megatron_outputs(model: Model) -> torch.Tensor:
    """fp32 logits [B, S, V] on the probes, or the score at every token [B, S] (collective)."""
    tokens = probe_tokens(model.shape.vocab_size)
    if model.head == "lm":
        return forward.logits(model, tokens).cpu()
    return forward.values(model, [{"tokens_BS": tokens}])[0].cpu()


@torch.no_grad()
def outputs_agree(
    directory: Path, config: Qwen3Config, outputs: torch.Tensor, tolerance: float, found: Findings
) -> None:
    """transformers loads the directory, with nothing missing or left over, and computes what Megatron computed."""
    head = head_of(config)
    loader = Qwen3ForCausalLM if head == "lm" else Qwen3ForSequenceClassification
    network, info = loader.from_pretrained(
        directory, config=config, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            found.failures.append(f"transformers reports {kind}: {sorted(map(str, info[kind]))[:_SHOWN]}")
    _compare_outputs(network, config, outputs, tolerance, found)


@torch.no_grad()
def tensor_outputs_agree(
    written: NamedTensors, config: Qwen3Config, outputs: torch.Tensor, tolerance: float, found: Findings
) -> None:
    """transformers' language model filled from tensors by name computes what Megatron computed."""
    network = Qwen3ForCausalLM(config)
    state = {name: _whole(written, name) for name in written.names()}
    if config.tie_word_embeddings:
        state[LM_HEAD] = state[EMBEDDING]
    network.load_state_dict(state, strict=True)
    _compare_outputs(network, config, outputs, tolerance, found)


def merging_agrees(beside: torch.Tensor, merged: torch.Tensor, tolerance: float, found: Findings) -> None:
    """Megatron computes with merged weights what it computed with adapters beside them, both in fp32, unrounded."""
    difference, limit = float((beside - merged).abs().max()), tolerance * max(1.0, float(beside.abs().max()))
    if not difference <= limit:
        found.failures.append(f"merging the adapters changes outputs by {difference:.3g}, more than {limit:.3g}")
    found.body["merging_max_abs_diff"] = difference


def _compare_outputs(
    network: torch.nn.Module, config: Qwen3Config, outputs: torch.Tensor, tolerance: float, found: Findings
) -> None:
    tokens = probe_tokens(config.vocab_size)
    network.eval()
    if head_of(config) == "lm":
        theirs = network(input_ids=tokens).logits.float()
    else:
        theirs = network.score(network.model(input_ids=tokens).last_hidden_state)[..., 0].float()
    difference, largest = float((theirs - outputs).abs().max()), float(theirs.abs().max())
    limit = tolerance * max(1.0, largest)
    if not difference <= limit:
        found.failures.append(f"outputs differ by {difference:.3g}, more than {limit:.3g}")
    same = (theirs.argmax(-1) == outputs.argmax(-1)).float().mean() if head_of(config) == "lm" else 1.0
    cosine = torch.cosine_similarity(theirs.flatten().double(), outputs.flatten().double(), dim=0)
    found.body |= {
        "logits_max_abs_diff": difference,
        "logits_largest": largest,
        "logits_tolerance": limit,
        "cosine": float(cosine),
        "top1_agreement": float(same),
        "probes": {"sequences": PROBES, "length": PROBE_LENGTH, "seed": PROBE_SEED},
    }


def head_of(config: Qwen3Config) -> Head:
    return "scalar" if "Qwen3ForSequenceClassification" in config.architectures else "lm"


# ---------------------------------------------------------------- layer by layer


@torch.no_grad()
def layers_agree(
    directory: Path, config: Qwen3Config, megatron: SingleLayer, count: int, tolerance: float, found: Findings
) -> None:
    """Sampled layers, the embedding and the head compute in transformers what they compute in megatron-core."""
    written = opened(HfTensors(directory))
    written_layers_agree(written, config, megatron, count, tolerance, found)
    written.close()


@torch.no_grad()
def written_layers_agree(
    written: NamedTensors, config: Qwen3Config, megatron: SingleLayer, count: int, tolerance: float, found: Findings
) -> None:
    """The same of tensors by name."""
    _names_agree(written, config, found)
    if found.failures:
        return
    generator = torch.Generator().manual_seed(PROBE_SEED)
    hidden = torch.randn(LAYER_PROBES, LAYER_PROBE_LENGTH, config.hidden_size, generator=generator)
    gaps: dict[str, dict[str, float]] = {}
    for layer in sampled(config.num_hidden_layers, count):
        theirs = _hf_parts(written, config, layer, hidden)
        megatron.choose(layer)
        ours = {"attention": megatron.attention(hidden), "mlp": megatron.mlp(hidden)}
        gaps[str(layer)] = {part: relative_gap(ours[part], theirs[part]) for part in ours}
    rows = torch.randint(0, config.vocab_size, (HEAD_ROWS,), generator=generator).tolist()
    gaps["embedding"] = {"rows": relative_gap(megatron.embeddings(rows), _rows(written, EMBEDDING, rows))}
    theirs_last = _hf_head(written, config, hidden, rows)
    gaps["head"] = {"outputs": relative_gap(megatron.head_outputs(hidden, rows), theirs_last)}
    for place, parts in gaps.items():
        for part, gap in parts.items():
            if not gap <= tolerance:
                where = f"layer {place}" if place.isdigit() else place
                found.failures.append(f"{where}: {part} differs by {gap:.3g} of its size, more than {tolerance:g}")
    found.body |= {
        "largest_relative_difference": max(gap for parts in gaps.values() for gap in parts.values()),
        "tolerance": tolerance,
        "layers": gaps,
        "probes": {"sequences": LAYER_PROBES, "length": LAYER_PROBE_LENGTH, "seed": PROBE_SEED, "head_rows": HEAD_ROWS},
    }


def sampled(layers: int, count: int) -> list[int]:
    """At most `count` layers, evenly spread, the first and the last among them."""
    if count >= layers:
        return list(range(layers))
    return sorted({round(index * (layers - 1) / max(1, count - 1)) for index in range(count)} | {0, layers - 1})


def relative_gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute value."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))


def _names_agree(written: NamedTensors, config: Qwen3Config, found: Findings) -> None:
    """The names and shapes are those of transformers' model, built without memory."""
    loader = Qwen3ForCausalLM if head_of(config) == "lm" else Qwen3ForSequenceClassification
    with torch.device("meta"):
        network = loader(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in network.named_parameters()}
    have = {name: written.shape(name) for name in written.names()}
    differing = sorted(name for name in wanted.keys() | have.keys() if wanted.get(name) != have.get(name))
    if differing:
        found.failures.append(f"transformers' model has other names or shapes: {', '.join(differing[:_SHOWN])}")


def _hf_parts(
    written: NamedTensors, config: Qwen3Config, layer: int, hidden_BSH: torch.Tensor
) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{layer}."
    with torch.device("meta"):
        module = Qwen3DecoderLayer(config, 0)
    read_when_used(module, lambda name, start, stop: written.rows(prefix + name, start, stop))
    positions = torch.arange(hidden_BSH.shape[1])[None]
    rotary = Qwen3RotaryEmbedding(config)(hidden_BSH, positions)
    attention, _ = module.self_attn(module.input_layernorm(hidden_BSH), position_embeddings=rotary, attention_mask=None)
    return {"attention": attention, "mlp": module.mlp(module.post_attention_layernorm(hidden_BSH))}


def _hf_head(written: NamedTensors, config: Qwen3Config, hidden_BSH: torch.Tensor, rows: list[int]) -> torch.Tensor:
    norm = Qwen3RMSNorm(config.hidden_size, config.rms_norm_eps)
    norm.weight.copy_(_whole(written, FINAL_NORM))
    if head_of(config) == "scalar":
        return torch.nn.functional.linear(norm(hidden_BSH), _whole(written, SCORE))
    name = EMBEDDING if config.tie_word_embeddings else LM_HEAD
    return torch.nn.functional.linear(norm(hidden_BSH), _rows(written, name, rows))


def _whole(written: NamedTensors, name: str) -> torch.Tensor:
    return written.rows(name, 0, written.shape(name)[0]).float()


def _rows(written: NamedTensors, name: str, rows: list[int]) -> torch.Tensor:
    return torch.cat([written.rows(name, row, row + 1) for row in rows]).float()


def hf_config(shape: Qwen3Shape, head: Head, dtype: torch.dtype, ends: dict[str, int]) -> Qwen3Config:
    """The config that will be written, with the ids of the tokenizer's ends."""
    written = json.loads(json.dumps(shape.to_hf_config(head=head, dtype=dtype) | ends))
    return Qwen3Config(**written, attn_implementation="sdpa")
