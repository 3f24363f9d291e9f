"""The platform layer: everything it changes is in its table, and torch itself is left alone."""

from __future__ import annotations

import importlib

import pytest
import torch

from her_nemo.megatron import platform
from her_nemo.megatron.cpu_adam import CpuAdam


@pytest.mark.parametrize("change", platform.CHANGES, ids=lambda change: change.what[:40])
def test_every_place_in_the_table_exists(change: platform.Change) -> None:
    assert change.why
    for place in change.where:
        module, _, name = place.partition(":")
        owner = importlib.import_module(module)
        for part in name.split(".") if name else []:
            owner = getattr(owner, part)


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is changed where CUDA is available")
def test_torch_is_untouched_and_megatron_sees_the_cpu() -> None:
    platform.apply()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    schedules = importlib.import_module("megatron.core.pipeline_parallel.schedules")
    assert schedules.torch.zeros(1, device="cuda").device.type == "cpu"
    assert schedules.torch.cuda.current_device() == torch.device("cpu")
    assert schedules.torch.nn is torch.nn
    assert schedules.torch.float32 is torch.float32
    assert platform.backend() == "gloo"


@pytest.mark.parametrize("decoupled", [True, False])
def test_cpu_adam_is_torchs_adam(decoupled: bool) -> None:
    torch.manual_seed(0)
    theirs = [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(7))]
    ours = [torch.nn.Parameter(p.detach().clone()) for p in theirs]
    settings = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-7}
    reference = (torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs, **settings)
    mine = CpuAdam(ours, adam_w_mode=decoupled, **settings)
    for _ in range(5):
        for a, b in zip(theirs, ours, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        reference.step()
        mine.step()
    for a, b in zip(theirs, ours, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert mine.param_groups[0]["step"] == 5
    assert set(mine.state[ours[0]]) == {"exp_avg", "exp_avg_sq"}
