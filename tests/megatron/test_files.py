"""Weights and checkpoints on disk: exact, readable by transformers, and refused when they are not what they claim."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY

from her_nemo.config.errors import UserError
from her_nemo.megatron import forward, optimizer, qwen3, qwen3_map, state, weights


class Harmful:
    """Unpickling this runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_transformers_reads_what_is_written(head: str, tmp_path: Path) -> None:
    from transformers import Qwen3ForCausalLM, Qwen3ForSequenceClassification

    model = qwen3.build(TINY, head=head, trainable=False)
    files = weights.save_hf(model, tmp_path, shard_bytes=50_000)
    assert sum(file.suffix == ".safetensors" for file in files) > 2
    tokens = torch.randint(0, 100, (2, 9))
    if head == "lm":
        theirs = Qwen3ForCausalLM.from_pretrained(tmp_path).eval()
        with torch.no_grad():
            expected = theirs(tokens).logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
        assert torch.allclose(forward.log_probs(model, [{"tokens_BS": tokens}])[0], expected, atol=1e-5)
    else:
        theirs = Qwen3ForSequenceClassification.from_pretrained(tmp_path).eval()
        with torch.no_grad():
            expected = theirs.score(theirs.model(tokens).last_hidden_state).squeeze(-1)
        assert theirs.config.num_labels == 1
        assert torch.allclose(forward.values(model, [{"tokens_BS": tokens}])[0], expected, atol=1e-5)
    again = qwen3.build(qwen3.Qwen3Shape.from_hf_dir(tmp_path), head=head, trainable=False)
    weights.load_hf(again, tmp_path)
    for (name, a), (_, b) in zip(weights.hf_tensors(model), weights.hf_tensors(again), strict=True):
        assert torch.equal(a, b), name


def test_buckets_are_the_same_tensors_in_groups() -> None:
    model = qwen3.build(TINY, trainable=False)
    tensors = [(name, tensor.clone()) for name, tensor in weights.hf_tensors(model)]
    limit = 16_000
    buckets = [[(name, tensor.clone()) for name, tensor in group] for group in weights.hf_buckets(model, limit)]
    sizes = [sum(tensor.nbytes for _, tensor in group) for group in buckets]
    assert len(buckets) > 3
    assert all(size <= limit or len(group) == 1 for size, group in zip(sizes, buckets, strict=True))
    flat = [entry for group in buckets for entry in group]
    for (name, tensor), (wanted, other) in zip(flat, tensors, strict=True):
        assert name == wanted
        assert torch.equal(tensor, other)


def test_wrong_tensors_are_named_all_at_once(hf_dir: Path, tmp_path: Path) -> None:
    tensors = load_file(hf_dir / "model.safetensors")
    tensors.pop("model.norm.weight")
    tensors.pop("model.layers.1.self_attn.k_proj.weight")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(81, 48)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        weights.load_hf(qwen3.build(TINY, trainable=False), tmp_path)
    said = str(error.value)
    for line in (
        "missing: model.norm.weight",
        "missing: model.layers.1.self_attn.k_proj.weight",
        "unexpected: model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.mlp.up_proj.weight has shape (81, 48), the model wants (80, 48)",
    ):
        assert line in said
    with pytest.raises(UserError, match=r"no \.safetensors"):
        weights.load_hf(qwen3.build(TINY, trainable=False), tmp_path / "nowhere")


def test_transformer_engine_names_map_to_the_same_tensors() -> None:
    """Norms fused into the next linear map have other names and the same Hugging Face tensors."""
    table = qwen3_map.LAYER_ENTRIES
    assert table["self_attention.linear_qkv.layer_norm_weight"] == table["input_layernorm.weight"]
    assert table["mlp.linear_fc1.layer_norm_weight"] == table["pre_mlp_layernorm.weight"]


def trained(head: str = "lm") -> tuple:
    model = qwen3.build(TINY, head=head)
    opt = optimizer.optimizer(model, lr=0.01)
    return model, opt, optimizer.scheduler(opt, lr=0.01)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    state.save(tmp_path / "c", *trained(), extra={"a": [1]})
    assert state.is_checkpoint(tmp_path / "c")
    assert not state.is_checkpoint(tmp_path)
    assert state.shape_of(tmp_path / "c") == TINY
    assert state.load(tmp_path / "c", qwen3.build(TINY, trainable=False)) == {"a": [1]}
    with pytest.raises(UserError, match="ffn_hidden_size: checkpoint 80, model 96"):
        state.load(tmp_path / "c", qwen3.build(replace(TINY, ffn_hidden_size=96)))
    with pytest.raises(UserError, match="not empty"):
        state.save(tmp_path / "c", *trained())
    scalar, opt, _ = trained("scalar")
    with pytest.raises(UserError, match="head: checkpoint 'lm', model 'scalar'"):
        state.load(tmp_path / "c", scalar, opt)
    bf16 = qwen3.build(TINY, dtype="bf16-mixed")
    with pytest.raises(UserError, match=r"trainer\.precision=32"):
        state.load(tmp_path / "c", bf16, optimizer.optimizer(bf16, lr=0.1))
    sharded = qwen3.build(TINY, distributed_optimizer=True)
    with pytest.raises(UserError, match="distributed_fused_adam"):
        state.load(tmp_path / "c", sharded, optimizer.optimizer(sharded, lr=0.1))


def test_a_language_model_checkpoint_starts_a_scalar_model(tmp_path: Path) -> None:
    model, _, _ = trained()
    state.save(tmp_path / "c", model)
    scalar = qwen3.build(TINY, head="scalar")
    head = scalar.bare().output_layer.weight.detach().clone()
    state.load(tmp_path / "c", scalar)
    assert torch.equal(scalar.bare().output_layer.weight, head)
    mine, theirs = dict(weights.hf_tensors(scalar)), dict(weights.hf_tensors(model))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    with pytest.raises(UserError, match="without an optimizer"):
        state.load(tmp_path / "c", model, trained()[1])


@pytest.mark.parametrize("file", [".metadata", "common.pt"])
def test_harmful_pickles_are_refused(file: str, tmp_path: Path) -> None:
    checkpoint, marker = tmp_path / "c", tmp_path / "ran"
    state.save(checkpoint, *trained())
    if file == ".metadata":
        (checkpoint / file).write_bytes(pickle.dumps(Harmful(marker)))
    else:
        torch.save({"x": Harmful(marker)}, checkpoint / file)
    with pytest.raises(UserError):
        state.load(checkpoint, qwen3.build(TINY))
    assert not marker.exists()
