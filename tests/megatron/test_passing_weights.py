"""Weights that are there only while their part computes: the same outputs, and never two parts' weights at once."""

from __future__ import annotations

import pytest
import torch

from her_nemo.megatron import passing_weights
from her_nemo.megatron.passing_weights import read_when_used, row_blocks


def network() -> torch.nn.Sequential:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.Linear(7, 3, bias=False))


@torch.no_grad()
def test_outputs_are_the_same_and_one_part_at_a_time_has_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passing_weights, "BLOCK_NUMBERS", 14)  # two rows of the second matrix, then one
    module, inputs = network(), torch.randn(4, 5)
    wanted = module(inputs)
    held = {name: parameter.clone() for name, parameter in module.named_parameters()}
    asked: list[tuple[str, int, int]] = []
    present: list[list[str]] = []

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        asked.append((name, start, stop))
        present.append([other for other, parameter in module.named_parameters() if not parameter.is_meta])
        return held[name][start:stop].to(torch.float64)

    read_when_used(module, read)
    assert all(parameter.is_meta for parameter in module.parameters())
    assert torch.equal(module(inputs), wanted)
    assert all(parameter.is_meta for parameter in module.parameters())
    assert [ask for ask in asked if ask[0] == "2.weight"] == [("2.weight", 0, 2), ("2.weight", 2, 3)]
    assert [place for place in present if any(name.startswith("0.") for name in place)] == [["0.weight"]]


@torch.no_grad()
def test_rows_of_another_width_are_refused_rather_than_spread() -> None:
    module = network()
    read_when_used(module, lambda name, start, stop: torch.zeros(stop - start, 1))
    with pytest.raises(RuntimeError, match=r"0\.weight: \(7, 1\) read for \(7, 5\)"):
        module(torch.randn(4, 5))


def test_blocks_cover_every_row_once() -> None:
    blocks = list(row_blocks((25, 2**21)))
    assert blocks == [(start, min(25, start + 4)) for start in range(0, 25, 4)]
    assert list(row_blocks((3,))) == [(0, 3)]
