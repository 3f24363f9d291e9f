"""A LoRA checkpoint as a directory that the `peft` package loads, and such a directory read as a whole model.

PEFT names modules as transformers does, under `base_model.model.`: `<module>.lora_A.weight` [rank, in] and
`<module>.lora_B.weight` [out, rank]; what they add is lora_alpha / r * B A x. Where megatron-core has one A for several
Hugging Face modules (q, k and v; gate and up), each gets a copy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from her_nemo.config.lora import HF_MODULES, Lora
from her_nemo.megatron.adapter_files import AdapterTensors
from her_nemo.megatron.safetensors_files import HfTensors, TensorFileWriter
from her_nemo.megatron.weights import NamedTensors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def peft_names(name: str) -> tuple[str, str]:
    """PEFT's names of A and B of a Hugging Face weight."""
    module = _PREFIX + name.removesuffix(".weight")
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def named(adapters: AdapterTensors, base: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the adapter under PEFT's name, in the checkpoint's dtype."""
    for name in adapters.adapted():
        a, b = peft_names(name)
        yield a, adapters.hf_a(name)
        yield b, adapters.hf_b(name, 0, base.shape(name)[0])


def write(directory: Path, adapters: AdapterTensors, base: NamedTensors, dtype: torch.dtype) -> None:
    """Write adapter_model.safetensors in `dtype`, one tensor in memory at a time."""
    lora = adapters.lora
    shapes: dict[str, tuple[int, ...]] = {}
    for name in adapters.adapted():
        rows, columns = base.shape(name)
        a, b = peft_names(name)
        shapes |= {a: (lora.rank, columns), b: (rows, lora.rank)}
    writer = TensorFileWriter(directory / WEIGHTS_FILE, shapes, dtype)
    for name, tensor in named(adapters, base):
        writer.write(name, 0, tensor.to(dtype).contiguous())
    writer.finish()


def config(lora: Lora, base_path: str) -> dict[str, Any]:
    """The content of adapter_config.json."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_path,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": [module for target in lora.targets for module in HF_MODULES[target]],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


class PeftTensors:
    """Base and adapter directory as one model under its Hugging Face names, in fp32, read by PEFT's rules alone."""

    def __init__(self, base: NamedTensors, directory: Path) -> None:
        self.adapter = HfTensors(directory)
        self._base = base
        settings = json.loads((directory / CONFIG_FILE).read_text())
        self._scale = settings["lora_alpha"] / settings["r"]
        self._modules = set(settings["target_modules"])

    def names(self) -> set[str]:
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        rows = self._base.rows(name, start, stop).float()
        if name.removesuffix(".weight").rpartition(".")[2] not in self._modules:
            return rows
        a, b = peft_names(name)
        return rows + self.adapter.rows(b, start, stop).float() @ self.adapter.whole(a).float() * self._scale

    def whole(self, name: str) -> torch.Tensor:
        return self.rows(name, 0, self.shape(name)[0])

    def close(self) -> None:
        self.adapter.close()
        self._base.close()
