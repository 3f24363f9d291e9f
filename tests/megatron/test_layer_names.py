"""Both kinds of layers, Transformer Engine's and our own, are the same model: by name, in files and in numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from te_shape import LAYER_NAMES, te_shaped
from tiny import TINY

from her_nemo.megatron import attention, forward, optimizer, qwen3, qwen3_map, state, weights
from her_nemo.megatron.qwen3 import Model

UNTIED = replace(TINY, tied=False)
TOKENS = torch.randint(0, TINY.vocab_size, (2, 12), generator=torch.Generator().manual_seed(4))


def built(fused: bool, head: str = "lm", *, trainable: bool = False) -> Model:
    torch.manual_seed(11 if fused else 12)
    if not fused:
        return qwen3.build(UNTIED, head=head, trainable=trainable)
    with te_shaped():
        return qwen3.build(UNTIED, head=head, trainable=trainable)


def outputs(model: Model) -> torch.Tensor:
    if model.head == "lm":
        return forward.logits(model, TOKENS)
    return forward.values(model, [{"tokens_BS": TOKENS}])[0]


def test_the_stand_in_has_transformer_engines_names() -> None:
    names = {name for name, _ in built(fused=True).bare().named_parameters()}
    outside = {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"}
    layers = {f"decoder.layers.{layer}.{name}" for layer in range(UNTIED.num_layers) for name in LAYER_NAMES}
    assert names == outside | layers


@pytest.mark.parametrize("fused", [False, True], ids=["local", "transformer_engine"])
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_every_tensor_has_a_name_on_the_other_side(fused: bool, head: str) -> None:
    """Megatron -> Hugging Face names every tensor once; Hugging Face -> Megatron finds every parameter."""
    found = weights.entries(built(fused, head))
    named = [name for entry in found.values() for name in entry.names]
    assert sorted(named) == sorted(qwen3_map.hf_shapes(UNTIED, head))
    own = {whole.entry.names for whole in qwen3_map.wholes(UNTIED, head)}
    assert {entry.names for entry in found.values()} == own


@pytest.mark.parametrize("layer", [0, 1])
def test_norms_have_two_spellings_and_one_tensor(layer: int) -> None:
    pairs = {
        "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm.weight", "input_layernorm.weight"),
        "mlp.linear_fc1.layer_norm_weight": ("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
    }
    for fused, (local, hf) in pairs.items():
        entry = qwen3_map.layer_entry(fused, layer)
        assert entry == qwen3_map.layer_entry(local, layer)
        assert entry.names == (f"model.layers.{layer}.{hf}",)
        assert qwen3_map.STORED_AS[local] == fused


def test_checkpoints_of_both_have_the_same_keys_and_shapes() -> None:
    """What the local layers write is what Transformer Engine's ask for, key by key (and the reverse)."""

    def asked_for(model: Model) -> dict[str, tuple[int, ...]]:
        held = state._sharded(model, None, only_adapters=False, is_loading=True)["model"]
        plain = {}
        for value in held.values():
            # fc1 is a factory: gate and up are cut apart, under its own key.
            plain[value.key] = tuple(getattr(value, "global_shape", None) or value.data.shape)
        return plain

    local, fused = asked_for(built(fused=False)), asked_for(built(fused=True))
    assert local == fused
    stored = {whole.key for whole in qwen3_map.wholes(UNTIED, "lm")}
    assert set(local) == stored
    assert {key.split("layers.")[1] for key in local if ".layers." in key} == LAYER_NAMES


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_the_same_hugging_face_weights_give_the_same_outputs(head: str, tmp_path: Path) -> None:
    source = built(fused=False, head=head)
    with torch.no_grad():
        for parameter in source.bare().parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    weights.save_hf(source, tmp_path / "hf")
    fused = built(fused=True, head=head)
    assert not torch.allclose(outputs(fused), outputs(source), atol=1e-2)
    weights.load_hf(fused, tmp_path / "hf")
    assert torch.allclose(outputs(fused), outputs(source), atol=1e-5)
    held = dict(weights.hf_tensors(fused))
    assert all(torch.equal(tensor, held[name]) for name, tensor in weights.hf_tensors(source))


@pytest.mark.parametrize("first", [False, True], ids=["local", "transformer_engine"])
def test_a_run_continues_on_the_other_kind_of_layers(first: bool, tmp_path: Path) -> None:
    """Checkpoint, optimizer included, written by one and continued by the other: the next step is the same."""

    def step(model: Model, opt: object) -> float:
        def nll(said: forward.TokenOutputs, _: dict) -> tuple:
            return -said.log_probs_BT.sum(), torch.tensor(said.log_probs_BT.numel()), {}

        report = forward.forward_backward(model, [{"tokens_BS": TOKENS}], nll)[0]
        optimizer.step(opt, 1)
        return float(report["loss_sum"])

    def whole(fused: bool) -> tuple:
        model = built(fused, trainable=True)
        opt = optimizer.optimizer(model, lr=1e-2)
        return model, opt, optimizer.scheduler(opt, lr=1e-2)

    model, opt, schedule = whole(first)
    for _ in range(3):
        step(model, opt)
    state.save(tmp_path / "checkpoint", model, opt, schedule)
    other, other_opt, other_schedule = whole(not first)
    state.load(tmp_path / "checkpoint", other, other_opt, other_schedule)
    for _ in range(2):
        assert step(other, other_opt) == pytest.approx(step(model, opt), rel=1e-5)
    held = dict(weights.hf_tensors(other))
    for name, tensor in weights.hf_tensors(model):
        assert torch.allclose(held[name], tensor, atol=1e-5), name


class Recorded(torch.nn.Module):
    """A core attention that keeps what it was asked."""

    def __init__(self, **settings: object) -> None:
        super().__init__()
        self.asked: list[tuple] = []

    def forward(self, query, key, value, attention_mask=None, **more):
        self.asked.append((attention_mask, more))
        return query.flatten(2)


def test_masks_never_reach_an_attention_that_would_ignore_them() -> None:
    """Transformer Engine's attention drops a mask when its type is causal; rollouts are padded on the left."""
    from megatron.core.transformer.enums import AttnMaskType

    config = qwen3.transformer_config(TINY, settings=qwen3.precision("32"))
    settings = {
        "config": config, "layer_number": 1, "attn_mask_type": AttnMaskType.causal, "attention_type": "self",
        "softmax_scale": None, "cp_comm_type": None, "pg_collection": None,
    }  # fmt: skip
    core = attention.with_masks(Recorded)(**settings)
    q, k, v = torch.randn(6, 2, 4, 16), torch.randn(6, 2, 2, 16), torch.randn(6, 2, 2, 16)
    assert torch.equal(core(q, k, v, None, attn_mask_type=AttnMaskType.causal), q.flatten(2))
    assert core.asked[0][1]["attn_mask_type"] is AttnMaskType.causal
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1).repeat(2, 1, 1, 1)
    hidden[1, 0, :, :2] = True
    hidden[1, 0, range(2), range(2)] = False
    said = core(q, k, v, hidden, attn_mask_type=AttnMaskType.causal)
    assert len(core.asked) == 1
    assert torch.equal(said, attention.SdpaAttention(**settings)(q, k, v, hidden))
    assert not list(core.parameters())
