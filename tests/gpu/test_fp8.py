"""FP8 through Transformer Engine: every recipe the GPU has learns as bf16 does, and what comes out is bf16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import checks
import pytest
import torch

from her_nemo.megatron import fp8_state, optimizer, platform, qwen3, state, weights
from her_nemo.megatron.precision import Fp8, Precision, precision
from her_nemo.megatron.qwen3 import Qwen3Shape
from her_nemo.planning.precision_checks import NEEDS

pytestmark = pytest.mark.gpu
RECIPES = {"delayed": "hybrid", "tensorwise": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}


@pytest.fixture(autouse=True)
def needs_transformer_engine() -> None:
    if not platform.has_transformer_engine():
        pytest.skip("needs Transformer Engine")


def settings_of(recipe: str, **options: object) -> Precision:
    if torch.cuda.get_device_capability() < NEEDS[recipe][0]:
        pytest.skip(f"{recipe} needs {NEEDS[recipe][1]}")
    return replace(precision("bf16-mixed"), fp8=Fp8(RECIPES[recipe], recipe, **options))


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_learns_as_bf16_does(recipe: str, small: Path, world: None) -> None:
    settings = settings_of(recipe)
    half = checks.trained(small, precision("bf16-mixed"), 30)
    found = checks.trained(small, settings, 30, length=90)
    assert found[-1] < 0.5 * found[0], found
    assert checks.trained(small, settings, 5) == pytest.approx(half[:5], rel=0.05)


def test_first_and_last_layers_in_bf16(small: Path, world: None) -> None:
    found = checks.trained(small, settings_of("tensorwise", bf16_layers=(1, 1)), 20)
    assert found[-1] < 0.7 * found[0], found


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_weights_kept_in_fp8(recipe: str, small: Path, world: None) -> None:
    """The optimizer starts from the weights that were loaded, unrounded, and the export is their bf16."""
    settings = settings_of(recipe, params=True)
    shape = Qwen3Shape.from_hf_dir(small)
    model = qwen3.build(shape, dtype=settings, distributed_optimizer=True)
    weights.load_hf(model, small)
    exact = qwen3.build(shape, dtype=precision("bf16-mixed"), trainable=False)
    weights.load_hf(exact, small)
    held = dict(weights.hf_tensors(exact))
    for name, tensor in weights.hf_tensors(model):
        assert tensor.dtype is torch.bfloat16
        gap = float((tensor.float() - held[name].float()).abs().max() / held[name].float().abs().max())
        assert gap < 0.04, (name, gap)
    optimizer.optimizer(model, lr=1e-3)
    unrounded = dict(exact.bare().named_parameters())
    for name, parameter in model.bare().named_parameters():
        assert torch.equal(parameter.main_param.flatten(), unrounded[name].float().flatten()), name
    found = checks.trained(small, settings, 20)
    assert found[-1] < 0.7 * found[0], found


def test_delayed_scaling_goes_on_where_it_was(small: Path, tmp_path: Path, world: None) -> None:
    settings = settings_of("delayed", amax_history_len=16)
    shape = Qwen3Shape.from_hf_dir(small)

    def whole() -> tuple:
        model = qwen3.build(shape, dtype=settings, distributed_optimizer=True)
        weights.load_hf(model, small)
        opt = optimizer.optimizer(model, lr=1e-3)
        return model, opt, optimizer.scheduler(opt, lr=1e-3)

    model, opt, schedule = whole()
    batch = {"tokens_BS": checks.tokens(shape, 4, 96)}
    for step in range(4):
        checks.forward.forward_backward(model, [batch], checks.nll)
        optimizer.step(opt, step)
    state.save(tmp_path / "c", model, opt, schedule)
    kept = fp8_state.collect(model.bare())
    assert kept
    other, other_opt, other_schedule = whole()
    state.load(tmp_path / "c", other, other_opt, other_schedule)
    again = fp8_state.collect(other.bare())
    assert all(torch.equal(again[name], kept[name]) for name in kept)
    said = [float(checks.forward.forward_backward(one, [batch], checks.nll)[0]["loss_sum"]) for one in (model, other)]
    assert said[0] == pytest.approx(said[1], rel=1e-3)
