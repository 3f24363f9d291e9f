"""LoRA in one process: it starts as its base, only adapters learn, and the merged model is the one that was trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import TINY
from transformers import Qwen3Config, Qwen3ForCausalLM

from her_nemo.config.lora import Lora, expand
from her_nemo.megatron import adapters, forward, optimizer, qwen3, state, weights
from her_nemo.rollout.engine import Sampling
from her_nemo.rollout.megatron_engine import MegatronEngine

ALL = Lora(expand(["all"]), rank=4, alpha=8.0)


def build(hf_dir: Path, lora: Lora | None = ALL, **changes: object) -> qwen3.Model:
    model = qwen3.build(TINY, lora=lora, **changes)
    weights.load_hf(model, hf_dir)
    return model


def nll(said: forward.TokenOutputs, _: dict) -> tuple:
    return -said.log_probs_BT.sum(), torch.tensor(said.log_probs_BT.numel()), {}


def tokens(step: int) -> torch.Tensor:
    return torch.randint(0, TINY.vocab_size, (3, 17), generator=torch.Generator().manual_seed(step % 2))


def train(model: qwen3.Model, steps: int = 6) -> list[float]:
    made = optimizer.optimizer(model, lr=2e-2)
    losses = []
    for step in range(steps):
        reports = forward.forward_backward(model, [{"tokens_BS": tokens(step)}], nll)
        losses.append(float(reports[0]["loss_sum"] / reports[0]["count"]))
        optimizer.step(made, step)
    return losses


def trained(hf_dir: Path, lora: Lora = ALL) -> qwen3.Model:
    model = build(hf_dir, lora)
    train(model)
    return model


def test_it_starts_as_its_base_to_the_bit(hf_dir: Path) -> None:
    adapted, plain = build(hf_dir), build(hf_dir, None)
    assert torch.equal(forward.logits(adapted, tokens(0)), forward.logits(plain, tokens(0)))
    pairs = zip(weights.hf_tensors(adapted), weights.hf_tensors(plain), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)


def test_the_frozen_reference_generates_as_its_base(hf_dir: Path) -> None:
    """Adapters that are off stay off while tokens are drawn, and are on again for the policy."""
    model, plain = trained(hf_dir), build(hf_dir, None)
    prompts = [[5, 9, 17, 3], [8, 2], [99, 1, 50]]

    def greedy(of: qwen3.Model) -> list[list[int]]:
        engine = MegatronEngine(of, pad_id=0, micro_batch_size=2)
        return engine.generate(prompts, Sampling(temperature=0.0, max_tokens=12), seed=0).response_ids

    policy = greedy(model)
    assert greedy(adapters.without(model)) == greedy(plain)
    assert greedy(plain) != policy
    assert greedy(model) == policy


def test_only_adapters_learn_and_only_they_have_states(hf_dir: Path) -> None:
    model = build(hf_dir)
    before = {name: value.clone() for name, value in model.bare().named_parameters()}
    made = optimizer.optimizer(model, lr=2e-2, weight_decay=0.0)
    forward.forward_backward(model, [{"tokens_BS": tokens(0)}], nll)
    optimizer.step(made, 0)
    sizes = {"linear_qkv": (48, 128), "linear_proj": (64, 48), "linear_fc1": (48, 160), "linear_fc2": (80, 48)}
    wanted = TINY.num_layers * sum(ALL.rank * (into + out) for into, out in sizes.values())
    assert sum(buffer.grad_data.numel() for buffer in model.chunks[0].buffers) == wanted
    inner = getattr(made, "optimizer", made)
    moments = [value for held in inner.state.values() for value in held.values() if value.dim() > 0]
    assert sum(value.numel() for value in moments) == 2 * wanted
    for name, value in model.bare().named_parameters():
        assert value.requires_grad == adapters.is_adapter(name)
        assert value.grad is None or adapters.is_adapter(name)
        # B is zero at first, so the first step gives A no gradient.
        moved = name.endswith("lora_b")
        assert torch.equal(value, before[name]) != moved, name
    learned = train(model, 31)
    assert learned[30] < learned[0] - 0.05


@pytest.mark.parametrize("targets", [("attention_qkv",), ("attention_dense",), ("mlp_fc1",), ("mlp_fc2",), ("all",)])
def test_the_online_map_is_the_merged_model(targets: tuple[str, ...], hf_dir: Path) -> None:
    """transformers computes with the gathered tensors what Megatron computes with its adapters beside the weights."""
    lora = replace(ALL, targets=expand(targets))
    model = trained(hf_dir, lora)
    named = dict(weights.hf_tensors(model))
    base = dict(weights.hf_tensors(adapters.without(model)))
    moved = {name for name in named if not torch.equal(named[name], base[name])}
    assert len(moved) == TINY.num_layers * {"attention_qkv": 3, "mlp_fc1": 2, "all": 7}.get(targets[0], 1)
    network = Qwen3ForCausalLM(Qwen3Config(**TINY.to_hf_config()))
    network.load_state_dict(named | {"lm_head.weight": named["model.embed_tokens.weight"]}, strict=True)
    with torch.no_grad():
        theirs = network.eval()(input_ids=tokens(99)).logits
    ours = forward.logits(model, tokens(99))
    off = forward.logits(adapters.without(model), tokens(99))
    assert float((ours - theirs).abs().max()) < 1e-5
    assert float((off - theirs).abs().max()) > 1e-2
    assert torch.equal(off, forward.logits(build(hf_dir, None), tokens(99)))


def test_recomputed_layers_give_the_same_losses(hf_dir: Path) -> None:
    again = build(hf_dir, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    assert train(again) == train(build(hf_dir))


def test_dropout_is_for_learning_only(hf_dir: Path) -> None:
    model = trained(hf_dir, replace(ALL, dropout=0.5))
    batch = {"tokens_BS": tokens(7)}
    first, second = (forward.forward_backward(model, [batch], nll)[0]["loss_sum"] for _ in range(2))
    assert first != second
    said = [forward.evaluate(model, [batch], nll)[0]["loss_sum"] for _ in range(2)]
    assert said[0] == said[1]
    assert float(said[0]) == pytest.approx(-float(forward.log_probs(model, [batch])[0].sum()), rel=1e-6)


def test_transformer_engines_fused_norm_is_applied_to_the_adapters_input(hf_dir: Path) -> None:
    """There the linear map gets the input before the norm; its own weight and epsilon say what it does to it."""
    model = trained(hf_dir)
    layer = model.bare().decoder.layers[0]
    linear, adapter = layer.mlp.linear_fc1, layer.mlp.linear_fc1_lora
    x = torch.randn(5, 2, TINY.hidden_size)
    with torch.no_grad():
        wanted = linear(layer.pre_mlp_layernorm(x))[0]
        weight = linear.weight
        fused = torch.nn.Module()
        fused.layer_norm_weight, fused.eps = layer.pre_mlp_layernorm.weight, layer.pre_mlp_layernorm.eps
        plain = torch.nn.functional.linear(layer.pre_mlp_layernorm(x), weight)
        found, _ = adapters._add(adapter, fused, (x,), (plain, None))
    assert torch.equal(found, wanted)


def test_a_checkpoint_holds_adapters_alone_and_fits_only_them(hf_dir: Path, tmp_path: Path) -> None:
    from her_nemo.config.errors import UserError
    from her_nemo.megatron.torch_dist import TorchDist

    model = trained(hf_dir)
    state.save(tmp_path / "it", model)
    held = TorchDist(tmp_path / "it")
    keys = held.keys()
    assert len(keys) == 8
    assert all("_lora.lora_" in key for key in keys)
    assert held.shape("decoder.layers.mlp.linear_fc1_lora.lora_b") == (2, 160, 4)
    again = build(hf_dir)
    state.load(tmp_path / "it", again)
    assert torch.equal(forward.logits(again, tokens(5)), forward.logits(model, tokens(5)))
    for other, said in (
        (None, "has none"),
        (replace(ALL, rank=8), "rank is 4"),
        (replace(ALL, alpha=1.0), "alpha is 8.0"),
        (replace(ALL, targets=("linear_qkv",)), "targets"),
    ):
        with pytest.raises(UserError, match=said):
            state.load(tmp_path / "it", build(hf_dir, other))


def test_names() -> None:
    assert expand(["all"]) == expand(["mlp", "attention"]) == ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    assert expand(["mlp_fc2", "attention_qkv"]) == ("linear_qkv", "linear_fc2")
