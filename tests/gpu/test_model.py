"""The model on a GPU: the same function as transformers', with both kinds of layers, and steps that learn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import checks
import pytest
import torch

from her_nemo.megatron import decoding, forward, platform, qwen3, weights
from her_nemo.megatron.qwen3 import Qwen3Shape

pytestmark = pytest.mark.gpu


@pytest.fixture(params=[False, True], ids=["local", "transformer_engine"])
def fused(request: pytest.FixtureRequest) -> bool:
    if request.param and not platform.has_transformer_engine():
        pytest.skip("needs Transformer Engine")
    return request.param


def test_the_platform_layer_changes_nothing(world: None) -> None:
    from megatron.core.pipeline_parallel import schedules

    assert schedules.torch is torch
    assert platform.device().type == "cuda"
    assert platform.backend() == "nccl"


def test_logits_in_bf16_are_as_close_as_transformers_own(fused: bool, small: Path, world: None) -> None:
    found = checks.parity(small, checks.with_layers("bf16", transformer_engine=fused))
    assert found["ours"] < 1.5 * found["theirs"], found
    assert found["cosine"] > 0.999, found
    assert found["top1_agreement"] > 0.95, found


def test_logits_in_fp32_are_transformers(small: Path, world: None) -> None:
    found = checks.parity(small, checks.with_layers("32", transformer_engine=None))
    assert found["ours"] < 1e-5, found
    assert found["top1_agreement"] > 0.999, found


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_steps_learn(fused: bool, packed: bool, small: Path, world: None) -> None:
    found = checks.trained(small, checks.with_layers("bf16-mixed", transformer_engine=fused), 30, packed=packed)
    assert found[-1] < 0.5 * found[0], found


def test_packed_and_unpacked_have_the_same_loss(fused: bool, small: Path, world: None) -> None:
    settings = checks.with_layers("bf16-mixed", transformer_engine=fused)
    rows, packed = (checks.trained(small, settings, 3, packed=how) for how in (False, True))
    assert packed == pytest.approx(rows, rel=5e-3)


def test_left_padding_is_hidden_from_decoding(fused: bool, small: Path, world: None) -> None:
    """A prompt says the same alone and padded beside a longer one."""
    model = qwen3.build(Qwen3Shape.from_hf_dir(small), dtype=checks.with_layers("bf16", transformer_engine=fused),
                        trainable=False)  # fmt: skip
    weights.load_hf(model, small)
    long, where = checks.tokens(model.shape, 1, 24).cuda(), torch.device("cuda")
    short = long[:, :10]
    with decoding.decoding(model):
        alone = decoding.Decoder(model, torch.ones(1, 10, dtype=torch.bool, device=where), 12).advance(short)
        padded = torch.cat([torch.cat([torch.zeros(1, 14, dtype=torch.int64, device=where), short], 1), long])
        valid = torch.ones(2, 24, dtype=torch.bool, device=where)
        valid[0, :14] = False
        beside = decoding.Decoder(model, valid, 26).advance(padded)
    scale = float(alone.abs().max())
    assert float((beside[:1] - alone).abs().max()) < 0.03 * scale
    assert float((beside[1:] - alone).abs().max()) > 0.1 * scale
    exact = forward.log_probs(model, [{"tokens_BS": long}])[0]
    assert torch.isfinite(exact).all()


def test_a_run_goes_on_on_the_gpu_and_back(tiny: Path, tmp_path: Path, steps: Callable[..., dict]) -> None:
    """fp32 weights, optimizer and schedule: CPU, then GPU, then CPU follow a run that stayed on the CPU."""
    stayed = steps("cpu", tiny, tmp_path / "stayed", 6)["losses"]
    first = steps("cpu", tiny, tmp_path / "a", 2)
    second = steps("gpu", tiny, tmp_path / "b", 2, tmp_path / "a")
    third = steps("cpu", tiny, tmp_path / "c", 2, tmp_path / "b")
    assert [part["device"] for part in (first, second, third)] == ["cpu", "cuda", "cpu"]
    moved = first["losses"] + second["losses"] + third["losses"]
    assert moved == pytest.approx(stayed, rel=1e-4)
