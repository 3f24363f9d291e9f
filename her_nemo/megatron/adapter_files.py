"""A LoRA checkpoint's weights without a model: its adapters, and base and adapters merged, read in rows.

A checkpoint of adapters holds, for every adapted linear map, A and B of all layers under megatron-core's names, B with
megatron-core's rows. What Hugging Face calls B of `q_proj` is therefore the same rows of B that are `q_proj`'s of the
weight, and `qkv` shares one A.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import torch

from her_nemo.config.errors import UserError
from her_nemo.config.lora import Lora
from her_nemo.megatron.adapters import OWNERS, SUFFIX, A, B
from her_nemo.megatron.qwen3 import Head, Qwen3Shape
from her_nemo.megatron.qwen3_map import Span, Whole, spans, wholes
from her_nemo.megatron.row_map import hf_intervals, megatron_rows
from her_nemo.megatron.torch_dist import TorchDist
from her_nemo.megatron.weights import NamedTensors

# A product of matrices may round a row differently when other rows are multiplied with it. Products are therefore
# always made of the same rows, whichever of them are asked for.
_PRODUCT_ROWS = 256
_SAMPLED_ROWS = 2


class AdapterTensors:
    """The A and B of a checkpoint, by megatron-core's target and layer, or by Hugging Face's weight."""

    def __init__(self, directory: Path, shape: Qwen3Shape, head: Head, lora: Lora) -> None:
        self.directory, self.lora = directory, lora
        self._held = TorchDist(directory)
        self._places: dict[str, tuple[Whole, list[Span]]] = {}
        self.wholes: dict[str, Whole] = {}
        for whole in wholes(shape, head):
            target = whole.key.removesuffix(".weight").rpartition(".")[2]
            if whole.layer is not None and target in lora.targets:
                table = spans(whole.entry, shape, whole.shape[0])
                self._places |= dict.fromkeys(whole.entry.names, (whole, table))
                self.wholes[f"{target}.{whole.layer}"] = whole
        self._check(shape)
        self.a = lru_cache(maxsize=2)(self._a)

    def _check(self, shape: Qwen3Shape) -> None:
        problems, have = [], self._held.keys()
        for target in self.lora.targets:
            rows, columns = self.wholes[f"{target}.0"].shape
            for which, size in ((A, (self.lora.rank, columns)), (B, (rows, self.lora.rank))):
                key, wanted = _key(target, which), (shape.num_layers, *size)
                if key not in have:
                    problems.append(f"missing: {key}")
                elif self._held.shape(key) != wanted:
                    problems.append(f"{key} has shape {self._held.shape(key)}, the model wants {wanted}")
        if problems:
            raise UserError(f"{self.directory} does not hold this model's adapters:\n  " + "\n  ".join(problems))

    def adapted(self) -> list[str]:
        """The Hugging Face weights that have an adapter, in the order of the layers."""
        return list(self._places)

    def _a(self, target: str, layer: int) -> torch.Tensor:
        return self._held.rows(_key(target, A), layer, 0, self.lora.rank)

    def b(self, target: str, layer: int, start: int, stop: int) -> torch.Tensor:
        """Rows of B [stop - start, rank] as megatron-core orders them."""
        return self._held.rows(_key(target, B), layer, start, stop)

    def hf_a(self, name: str) -> torch.Tensor:
        """A [rank, in] of a Hugging Face weight, in the checkpoint's dtype."""
        target, layer = self._target(name)
        return self.a(target, layer)

    def hf_b(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of B [stop - start, rank] of a Hugging Face weight."""
        target, layer = self._target(name)
        parts = [self.b(target, layer, *rows) for rows in hf_intervals(self._places[name][1], name, start, stop)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _target(self, name: str) -> tuple[str, int]:
        whole = self._places[name][0]
        assert whole.layer is not None
        return whole.key.removesuffix(".weight").rpartition(".")[2], whole.layer

    def close(self) -> None:
        self._held.close()


def _key(target: str, which: str) -> str:
    return f"decoder.layers.{OWNERS[target]}.{target}{SUFFIX}.{which}"


class MergedTensors:
    """Base and adapters as one model under its Hugging Face names. Adapted weights come in fp32."""

    def __init__(self, base: NamedTensors, adapters: AdapterTensors) -> None:
        self._base, self._adapters = base, adapters
        self._adapted = set(adapters.adapted())

    def names(self) -> set[str]:
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._adapted else self._base.dtype(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop), the same bits however they are asked for."""
        rows = self._base.rows(name, start, stop)
        if name not in self._adapted:
            return rows
        a, scale, count = self._adapters.hf_a(name).float(), self._adapters.lora.scale, self.shape(name)[0]
        parts = []
        for block in range(start - start % _PRODUCT_ROWS, stop, _PRODUCT_ROWS):
            b = self._adapters.hf_b(name, block, min(block + _PRODUCT_ROWS, count)).float()
            parts.append((b @ a)[max(0, start - block) : stop - block])
        return rows.float() + torch.cat(parts) * scale

    def whole(self, name: str) -> torch.Tensor:
        return self.rows(name, 0, self.shape(name)[0])

    def close(self) -> None:
        self._base.close()
        self._adapters.close()


class MegatronRows:
    """Base and adapters (rounded to `dtype`) as megatron-core's tensors, the adapters read without the map."""

    def __init__(
        self, base: NamedTensors, adapters: AdapterTensors, shape: Qwen3Shape, head: Head, dtype: torch.dtype
    ) -> None:
        self._base, self._adapters, self._shape, self._dtype = base, adapters, shape, dtype
        self._wholes = {(whole.key, whole.layer): whole for whole in wholes(shape, head)}

    def shape(self, key: str) -> tuple[int, ...]:
        """The whole shape, with the axis of layers if the key has one."""
        alone = self._wholes.get((key, None))
        return alone.shape if alone else (self._shape.num_layers, *self._wholes[(key, 0)].shape)

    def rows(self, key: str, layer: int | None, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor (of one layer of it); adapted ones in fp32."""
        whole = self._wholes[(key, layer)]
        rows = megatron_rows(self._base, spans(whole.entry, self._shape, whole.shape[0]), start, stop)
        target = key.removesuffix(".weight").rpartition(".")[2]
        if layer is None or target not in self._adapters.lora.targets:
            return rows
        a, b = self._adapters.a(target, layer), self._adapters.b(target, layer, start, stop)
        a, b = a.to(self._dtype), b.to(self._dtype)
        return rows.float() + (b.float() @ a.float()) * self._adapters.lora.scale

    def close(self) -> None:
        self._base.close()
        self._adapters.close()


def sampled_digest(tensors: NamedTensors, names: Iterable[str]) -> str:
    """Sixteen hex digits from the first and last rows of the named tensors, rounded to bfloat16.

    A model and its copy, its conversion or its bf16 rounding agree; other weights, another training step do not.
    """
    digest = hashlib.sha256()
    for name in sorted(names):
        for start, stop in _sampled(tensors.shape(name)[0]):
            rows = tensors.rows(name, start, stop).float().to(torch.bfloat16)
            digest.update(f"{name} {list(rows.shape)} {start}".encode())
            digest.update(rows.contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _sampled(count: int) -> Iterator[tuple[int, int]]:
    first = min(count, _SAMPLED_ROWS)
    yield 0, first
    if count > first:
        yield max(first, count - _SAMPLED_ROWS), count
