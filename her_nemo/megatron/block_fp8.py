"""Weights in e4m3 with one fp32 scale for every block of 128 x 128, as in DeepSeek-V3's and Qwen3's own FP8 files.

`X.weight` holds w / s rounded to e4m3, `X.weight_scale_inv` the s of each block: its largest |w| over 448, the largest
number of e4m3. Only the layers' matrices are quantised; norms, embedding and heads stay in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from her_nemo.config.errors import UserError
from her_nemo.megatron.safetensors_files import HfTensors
from her_nemo.megatron.streaming import Tensors
from her_nemo.planning.precision_checks import EXPORT_BLOCK as BLOCK

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
# Rounding to three bits of mantissa; below e4m3's smallest normal number, 2^-6, to steps of 2^-9.
RELATIVE_BOUND, SUBNORMAL_BOUND = 2.0**-4, 2.0**-10
SCALE = "_scale_inv"
CHUNK = 2**22
REST = torch.bfloat16
_MATRICES = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down"))


def is_quantised(name: str) -> bool:
    """True for the Hugging Face names of the layers' matrices."""
    return name.endswith(_MATRICES)


def blocks_of(size: int) -> int:
    """Blocks that cover so many rows or columns."""
    return -(-size // BLOCK)


def quantise(rows_RC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows from the start of a block -> (e4m3 [R, C], fp32 scales [R/128, C/128], rounded up)."""
    rows, columns = rows_RC.shape
    whole = F.pad(rows_RC.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    tiles = whole.view(blocks_of(rows), BLOCK, blocks_of(columns), BLOCK)
    largest = tiles.abs().amax((1, 3))
    # A block of zeros has scale 1; a subnormal scale would be no number on a GPU.
    scales = torch.where(largest > 0, largest / LARGEST, 1.0).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = (tiles / scales[:, None, :, None]).clamp(-LARGEST, LARGEST)
    return scaled.view(whole.shape)[:rows, :columns].to(E4M3), scales


def dequantise(rows_RC: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What a reader computes: e4m3 rows from the start of a block times their scales, fp32."""
    spread = scales.float().repeat_interleave(BLOCK, 0)[: rows_RC.shape[0]]
    return rows_RC.float() * spread.repeat_interleave(BLOCK, 1)[:, : rows_RC.shape[1]]


def allowed_error(rows_RC: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Largest |w - dequantised| that rounding to e4m3 explains, for every w."""
    floor = dequantise(torch.full_like(rows_RC, SUBNORMAL_BOUND, dtype=torch.float32), scales)
    return torch.maximum(rows_RC.float().abs() * RELATIVE_BOUND, floor) * (1 + 1e-5)


def quantization_config(head: str) -> dict[str, Any]:
    """The entry of config.json that vLLM and transformers read."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        # vLLM's score is a linear layer like any other, and its lm_head is none; transformers names both.
        "modules_to_not_convert": ["lm_head" if head == "lm" else "score"],
    }


def _aligned(start: int, stop: int, size: int) -> tuple[int, int]:
    """The whole blocks that [start, stop) lies in."""
    return start // BLOCK * BLOCK, min(size, blocks_of(stop) * BLOCK)


def row_chunks(first: int, last: int, columns: int, numbers: int = CHUNK) -> Iterator[tuple[int, int]]:
    """[start, stop) of whole blocks of rows, about so many numbers each: memory does not grow with the matrix."""
    step = max(1, numbers // columns // BLOCK) * BLOCK
    for start in range(first, last, step):
        yield start, min(last, start + step)


class Quantised:
    """Another source's tensors under the names of the quantised files, computed as they are read.

    A matrix is read twice, for its numbers and for its scales: no state, so that a run that was cut off goes on at any
    file.
    """

    def __init__(self, held: Tensors) -> None:
        self._held = held

    def stored(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype) of every tensor of the files, in no order."""
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name in self._held.names():
            size = self._held.shape(name)
            found[name] = (size, E4M3 if is_quantised(name) else REST)
            if is_quantised(name):
                found[name + SCALE] = (tuple(map(blocks_of, size)), torch.float32)
        return found

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor of the files. UserError if a weight is not finite."""
        of_scales = name.endswith(SCALE)
        source = name.removesuffix(SCALE)
        if not is_quantised(source):
            return self._held.rows(name, start, stop)
        first, last = (start * BLOCK, stop * BLOCK) if of_scales else (start, stop)
        size, columns = self._held.shape(source)
        first, last = _aligned(first, min(last, size), size)
        pieces = [self._quantised(source, *chunk)[of_scales] for chunk in row_chunks(first, last, columns)]
        whole = torch.cat(pieces)
        return whole if of_scales else whole[start - first : stop - first]

    def _quantised(self, source: str, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self._held.rows(source, first, last)
        if not bool(rows.isfinite().all()):
            raise UserError(f"{source}: holds numbers that are not finite: it has no fp8 form")
        return quantise(rows)

    def close(self) -> None:
        self._held.close()


class Dequantised:
    """The files that `Quantised` describes, read back as the model's own tensors, matrices in fp32."""

    def __init__(self, held: HfTensors) -> None:
        self._held = held

    def names(self) -> set[str]:
        return {name for name in self._held.names() if not name.endswith(SCALE)}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._held.shape(name)

    def scales(self, name: str, first: int, last: int) -> torch.Tensor:
        """Scales of the blocks that rows [first, last), whole blocks, lie in."""
        return self._held.rows(name + SCALE, first // BLOCK, blocks_of(last))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if not is_quantised(name):
            return self._held.rows(name, start, stop)
        first, last = _aligned(start, stop, self.shape(name)[0])
        found = dequantise(self._held.rows(name, first, last), self.scales(name, first, last))
        return found[start - first : stop - first]

    def whole(self, name: str) -> torch.Tensor:
        return self.rows(name, 0, self.shape(name)[0])

    def row_blocks(self, name: str) -> Iterator[tuple[int, int]]:
        """[start, stop) of rows to look at together."""
        rows, columns = self.shape(name)
        return row_chunks(0, rows, columns)

    def close(self) -> None:
        self._held.close()


def opened(held: HfTensors) -> HfTensors | Dequantised:
    """`held`, or its dequantised view if it holds scales."""
    return Dequantised(held) if any(name.endswith(SCALE) for name in held.names()) else held
