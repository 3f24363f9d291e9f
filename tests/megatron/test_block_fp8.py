"""Weights in e4m3 with a scale a block: how far rounding takes them, and the same numbers whichever rows are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from her_nemo.config.errors import UserError
from her_nemo.megatron import block_fp8, safetensors_files
from her_nemo.megatron.block_fp8 import E4M3, SCALE, Dequantised, Quantised
from her_nemo.megatron.safetensors_files import HfTensors, TensorFileWriter

MATRIX, NORM = "model.layers.0.mlp.down_proj.weight", "model.norm.weight"


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Magnitudes over ten powers of two, an outlier, a block of zeros."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(-10 * torch.rand(rows, columns, generator=generator))
    found = torch.randn(rows, columns, generator=generator) * spread * 0.05
    found[0, 0] = 3.0
    found[:128, 128:256] = 0.0
    return found


@pytest.mark.parametrize(("rows", "columns"), [(256, 384), (128, 128), (200, 300), (1, 5)])
def test_every_weight_is_within_the_bound(rows: int, columns: int) -> None:
    wanted = weights(rows, columns)
    numbers, scales = block_fp8.quantise(wanted)
    assert numbers.dtype is E4M3
    assert scales.dtype is torch.float32
    assert scales.shape == (-(-rows // 128), -(-columns // 128))
    got = block_fp8.dequantise(numbers, scales)
    assert got.shape == wanted.shape
    assert bool(((got - wanted).abs() <= block_fp8.allowed_error(wanted, scales)).all())
    assert float((got - wanted).abs().max()) > 0 or columns == 5
    # The largest of a block is 448 times its scale, exactly a number of e4m3.
    assert got[0, 0] == pytest.approx(3.0, rel=1e-6)
    if columns >= 256:
        assert float(got[:128, 128:256].abs().max()) == 0.0
        assert float(scales[0, 1]) == 1.0


def test_the_bound_is_tight() -> None:
    """Halfway between two numbers of e4m3: nothing smaller than 2^-4 would do, nor than half a step below 2^-6."""
    row = torch.zeros(1, 128)
    row[0, :3] = torch.tensor([448.0, 1.0 + 2.0**-4, 2.0**-10])
    numbers, scales = block_fp8.quantise(row)
    assert float(scales) == 1.0
    error = (block_fp8.dequantise(numbers, scales) - row).abs()[0]
    assert float(error[1]) == 2.0**-4
    assert float(error[2]) == block_fp8.SUBNORMAL_BOUND
    assert float(error[1] / row[0, 1]) > 0.9 * block_fp8.RELATIVE_BOUND


def test_an_outlier_costs_its_block_only() -> None:
    wanted = weights(256, 256)
    got = block_fp8.dequantise(*block_fp8.quantise(wanted))
    calm = wanted.clone()
    calm[0, 0] = 0.0
    without = block_fp8.dequantise(*block_fp8.quantise(calm))
    assert torch.equal(got[128:], without[128:])
    assert not torch.equal(got[:128, 1:128], without[:128, 1:128])


def test_transformers_reads_the_same_numbers() -> None:
    """transformers' own dequantisation of fine-grained FP8, on the tensors that we write."""
    numbers, scales = block_fp8.quantise(weights(256, 384))
    theirs = Fp8Dequantize(None)._dequantize_one(numbers, scales, torch.float32)
    assert torch.equal(theirs, block_fp8.dequantise(numbers, scales))


@pytest.fixture
def written(tmp_path: Path) -> tuple[torch.Tensor, Quantised, Dequantised]:
    """(the matrix, its quantised view, what was written of it and read back)."""
    matrix = weights(300, 256)
    tensors = {MATRIX: matrix, NORM: torch.randn(256)}
    (tmp_path / "plain").mkdir()
    writer = TensorFileWriter(
        tmp_path / "plain" / "model.safetensors", {k: tuple(v.shape) for k, v in tensors.items()}, torch.float32
    )
    for name, tensor in tensors.items():
        writer.write(name, 0, tensor)
    writer.finish()
    view = Quantised(HfTensors(tmp_path / "plain"))
    stored = view.stored()
    assert stored[MATRIX] == ((300, 256), E4M3)
    assert stored[MATRIX + SCALE] == ((3, 2), torch.float32)
    assert stored[NORM] == ((256,), torch.bfloat16)
    (tmp_path / "fp8").mkdir()
    dtypes = {name: kind for name, (_, kind) in stored.items()}
    shapes = {name: size for name, (size, _) in stored.items()}
    out = TensorFileWriter(tmp_path / "fp8" / "model.safetensors", shapes, dtypes)
    for name, (size, kind) in stored.items():
        for start in range(0, size[0], 77):
            stop = min(size[0], start + 77)
            out.write(name, start, view.rows(name, start, stop).to(kind).contiguous())
    out.finish()
    return matrix, view, Dequantised(HfTensors(tmp_path / "fp8"))


@pytest.mark.parametrize("chunk", [1, 2**22])
def test_any_rows_give_the_same_numbers(
    chunk: int, written: tuple[torch.Tensor, Quantised, Dequantised], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, view, back = written
    monkeypatch.setattr(block_fp8.row_chunks, "__defaults__", (chunk,))
    numbers, scales = block_fp8.quantise(matrix)
    for start, stop in ((0, 300), (0, 1), (127, 129), (250, 300)):
        assert torch.equal(view.rows(MATRIX, start, stop).float(), numbers[start:stop].float())
        assert torch.equal(back.rows(MATRIX, start, stop), block_fp8.dequantise(numbers, scales)[start:stop])
    assert torch.equal(view.rows(MATRIX + SCALE, 1, 3), scales[1:3])
    assert back.names() == {MATRIX, NORM}
    assert [*block_fp8.row_chunks(0, 300, 256, 128 * 256)] == [(0, 128), (128, 256), (256, 300)]
    assert block_fp8.opened(back._held).__class__ is Dequantised


def test_a_reader_of_weights_refuses_what_is_quantised(
    written: tuple[torch.Tensor, Quantised, Dequantised]
) -> None:
    held = written[2]._held
    said = safetensors_files.problems_of(held, {MATRIX: (300, 256), NORM: (256,)})
    assert f"unexpected: {MATRIX}{SCALE}" in said
    assert any("float8_e4m3fn; float32, bfloat16 and float16 are read" in line for line in said)


def test_numbers_that_are_not_finite_are_refused() -> None:
    class Held:
        def names(self) -> set[str]:
            return {MATRIX}

        def shape(self, name: str) -> tuple[int, ...]:
            return (2, 2)

        def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
            return torch.tensor([[1.0, float("inf")], [0.0, 0.0]])[start:stop]

    with pytest.raises(UserError, match="not finite"):
        Quantised(Held()).rows(MATRIX, 0, 2)
